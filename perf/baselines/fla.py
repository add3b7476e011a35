"""Baselines from flash-linear-attention (FLA), stage by stage, on the inputs of our cases.

Each function takes the case and returns a function that prepares a call from the inputs:
conversions to the baseline's argument layout happen there and are not timed. Without FLA installed
there are no baseline rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kda_ops._cases import Case
from perf.harness.machine import version
from perf.harness.rows import Call, Inputs, Prepare

Baseline = Callable[[Case], Prepare]


def fla(baseline: Any) -> dict[str, Any]:
    """A baseline under its name in reports, or nothing if FLA is not installed."""
    installed = version("fla-core")
    return {} if installed is None else {f"FLA {installed}": baseline}


def _gate_arguments(inputs: Inputs) -> dict[str, Any]:
    bias = inputs.get("dt_bias")
    return {
        "g": inputs["raw_gate"].contiguous(),
        "A_log": inputs["A_log"],
        "dt_bias": None if bias is None else bias.reshape(-1),
        "lower_bound": inputs.get("lower_bound"),
    }


def _chunk_arguments(inputs: Inputs, chunk_size: int) -> dict[str, Any]:
    """The varlen arguments, with FLA's chunk table computed beforehand."""
    from fla.ops.utils.index import prepare_chunk_indices

    offsets = inputs.get("cu_seqlens")
    table = None if offsets is None else prepare_chunk_indices(offsets, chunk_size)
    return {"chunk_size": chunk_size, "cu_seqlens": offsets, "chunk_indices": table}


def fla_gate(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda.gate import fused_kda_gate

        arguments = _gate_arguments(inputs)
        return lambda: fused_kda_gate(**arguments)

    return prepare


def fla_gate_cumsum(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda.gate import kda_gate_chunk_cumsum
        from fla.ops.utils.constant import RCP_LN2

        arguments = _gate_arguments(inputs) | _chunk_arguments(inputs, inputs.get("chunk_size", 64))
        return lambda: kda_gate_chunk_cumsum(**arguments, scale=RCP_LN2)

    return prepare


def fla_chunk_cumsum(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.ops.utils import chunk_local_cumsum

        g, scale = inputs["g"].contiguous(), inputs.get("scale", 1.0)
        arguments = _chunk_arguments(inputs, inputs.get("chunk_size", 64))
        return lambda: chunk_local_cumsum(g, scale=scale, **arguments)

    return prepare


def fla_l2norm(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.modules.norm.l2norm import l2norm_fwd

        x, eps = inputs["x"].contiguous(), inputs.get("eps", 1e-6)
        return lambda: l2norm_fwd(x, eps)[0]

    return prepare


def fla_rms_norm_gated(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        o, gate = inputs["o"].contiguous(), inputs["output_gate"].contiguous()
        weight, eps = inputs["weight"], inputs.get("eps", 1e-5)
        return lambda: rms_norm_gated(o, gate, weight, None, activation="sigmoid", eps=eps)

    return prepare


def _fla_conv_history(inputs: Inputs, width: int, keep: Tensor | None) -> Tensor | None:
    """The sequences' histories in FLA's layout: `[N, D, W]`, the newest input last."""
    state = inputs.get("conv_state")
    if state is None:
        return None
    layout = inputs.get("layout") or "SD"
    rows = state if layout == "DS" else state.transpose(1, 2)  # [slots, D, L]
    rows = rows[inputs["state_indices"].long(), :, : width - 1]
    rows = torch.zeros_like(rows) if keep is None else torch.where(keep[:, None, None], rows, 0)
    return torch.nn.functional.pad(rows, (1, 0)).contiguous()


def _fla_convolution(
    inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None
) -> Call:
    """FLA's convolution of a part of a case's channels."""
    from fla.modules.causal_conv1d import causal_conv1d

    varlen = _chunk_arguments(inputs, 64)
    del varlen["chunk_size"]  # FLA chooses its own
    activation = inputs.get("activation", "silu")

    def call() -> Tensor:
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=history,
            output_final_state=history is not None,
            activation=activation,
            **varlen,
        )[0]

    return call


def fla_short_conv(case: Case) -> Prepare:
    """One call over packed q | k | v; FLA's own layer makes three."""

    def prepare(inputs: Inputs) -> Call:
        x, weight = inputs["x"], inputs["weight"]
        batched = x if x.dim() == 3 else x.unsqueeze(0)
        history = _fla_conv_history(inputs, weight.shape[1], inputs.get("has_initial_state"))
        return _fla_convolution(inputs, batched, weight, inputs.get("bias"), history)

    return prepare


def fla_short_conv_qkv(case: Case) -> Prepare | None:
    """Separate convolutions of q, k and v and norms of q and k, as in FLA's own layer (its norm
    does not accept slices of a packed result).
    """
    if "apart" in case.name:  # the same for FLA
        return None

    def prepare(inputs: Inputs) -> Call:
        from fla.modules.norm.l2norm import l2norm_fwd

        key_dim, K, eps = (inputs[name] for name in ("key_dim", "head_dim", "norm_eps"))
        x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
        sizes = [key_dim, key_dim, x.shape[-1] - 2 * key_dim]
        history = _fla_conv_history(inputs, weight.shape[1], inputs.get("has_initial_state"))
        biases = [None] * 3 if bias is None else bias.split(sizes)
        histories = [None] * 3 if history is None else history.split(sizes, dim=1)
        q_call, k_call, v_call = (
            _fla_convolution(
                inputs,
                part.contiguous(),
                taps.contiguous(),
                offset,
                None if past is None else past.contiguous(),
            )
            for part, taps, offset, past in zip(
                x.split(sizes, dim=-1), weight.split(sizes), biases, histories, strict=True
            )
        )

        def call() -> tuple[Tensor, Tensor, Tensor]:
            q, k = (l2norm_fwd(make().unflatten(-1, (-1, K)), eps)[0] for make in (q_call, k_call))
            return q, k, v_call()

        return call

    return prepare


def fla_short_conv_update(case: Case) -> Prepare:
    """One token per sequence. FLA's state is dense, `[N, D, W]`, without slots."""

    def prepare(inputs: Inputs) -> Call:
        from fla.modules.causal_conv1d import causal_conv1d_update

        weight, bias = inputs["weight"], inputs.get("bias")
        everyone = torch.ones_like(inputs["state_indices"], dtype=torch.bool)
        cache = _fla_conv_history(inputs, weight.shape[1], everyone)
        x = inputs["x"].reshape(-1, weight.shape[0])
        activation = inputs.get("activation", "silu")
        return lambda: causal_conv1d_update(
            x, cache, weight=weight, bias=bias, activation=activation
        )[0]

    return prepare


def fla_chunk_kda(case: Case) -> Prepare:
    """FLA's chunk kernels with `chunk_kda`'s inputs, normalized q and k and the cumulative gate:
    its pipeline without l2norm, gate and cumsum.
    """
    bounded = "bounded" in case.name

    def prepare(inputs: Inputs) -> Call:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.gla.chunk import chunk_gla_fwd_o_gk
        from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra
        from fla.ops.utils.index import prepare_chunk_offsets

        q, k, v, G, beta = (
            inputs[name].contiguous() for name in ("q", "k", "v", "g_cumsum", "beta")
        )
        scale = inputs.get("scale") or q.shape[-1] ** -0.5
        initial_state = inputs.get("initial_state")
        output_final_state = inputs.get("output_final_state", False)
        varlen = _chunk_arguments(inputs, 64)
        offsets = varlen["cu_seqlens"]
        chunk_offsets = None if offsets is None else prepare_chunk_offsets(offsets, 64)

        def call() -> tuple[Tensor, Tensor | None]:
            w, u, _, kg, Aqk, _ = chunk_kda_fwd_intra(
                q=q, k=k, v=v, gk=G, beta=beta, scale=scale, safe_gate=bounded, **varlen
            )
            h, v_new, final_state = chunk_gated_delta_rule_fwd_h(
                k=kg,
                w=w,
                u=u,
                gk=G,
                initial_state=initial_state,
                output_final_state=output_final_state,
                state_v_first=True,
                chunk_offsets=chunk_offsets,
                **varlen,
            )
            o = chunk_gla_fwd_o_gk(
                q=q, v=v_new, g=G, A=Aqk, h=h, scale=scale, state_v_first=True, **varlen
            )
            return o, final_state

        return call

    return prepare


def fla_core(case: Case) -> Prepare:
    """FLA's whole prefill core from raw q, k, v, gate input and beta."""

    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda import chunk_kda

        lower_bound = inputs["lower_bound"]
        q, k, v, x, beta = (inputs[name] for name in ("q", "k", "v", "raw_gate", "raw_beta"))
        A_log, dt_bias = inputs["A_log"], inputs["dt_bias"].reshape(-1)

        def call() -> tuple[Tensor, Tensor]:
            return chunk_kda(
                q,
                k,
                v,
                x,
                beta,
                A_log=A_log,
                dt_bias=dt_bias,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                safe_gate=lower_bound is not None,
                lower_bound=lower_bound,
                state_v_first=True,
                cu_seqlens=inputs.get("cu_seqlens"),
            )

        return call

    return prepare


def fla_recurrent_kda(case: Case) -> Prepare:
    """FLA's step kernel on the same paged states, written in place."""

    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

        q, k, v, g, beta = (inputs[name].contiguous() for name in ("q", "k", "v", "g", "beta"))

        def call() -> Tensor:
            return fused_recurrent_kda_fwd(
                q,
                k,
                v,
                g,
                beta,
                initial_state=inputs["state"],
                scale=inputs.get("scale"),
                inplace_final_state=True,
                state_v_first=True,
                cu_seqlens=inputs.get("cu_seqlens"),
                ssm_state_indices=inputs["state_indices"],
                num_accepted_tokens=inputs.get("num_accepted"),
            )[0]

        return call

    return prepare


def fla_kda_decode(case: Case) -> Prepare | None:
    """A decode step of FLA's layer: three convolutions, the recurrence with norm and gate in its
    kernel, the gated norm. One token per sequence; the convolution state is dense.
    """
    if "spec" in case.name or "apart" in case.name:
        return None

    def prepare(inputs: Inputs) -> Call:
        from fla.modules.causal_conv1d import causal_conv1d_update
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

        x, weight, state, slots = (
            inputs[name] for name in ("x", "weight", "state", "state_indices")
        )
        N, (HV, V, K) = x.shape[0], state.shape[1:]
        key_dim = (x.shape[1] - HV * V) // 2
        sizes = [key_dim, key_dim, HV * V]
        everyone = torch.ones(N, dtype=torch.bool, device=x.device)
        history = _fla_conv_history({**inputs, "state_indices": slots}, weight.shape[1], everyone)
        if history is None:
            raise ValueError("inputs must hold conv_state")
        parts = [
            (a, b.contiguous(), c.contiguous())
            for a, b, c in zip(
                x.split(sizes, dim=1), history.split(sizes, dim=1), weight.split(sizes), strict=True
            )
        ]
        f, z = (
            inputs["raw_gate"].reshape(N, 1, HV, K).contiguous(),
            inputs["output_gate"].reshape(N, 1, HV, V),
        )
        beta = inputs["raw_beta"].reshape(N, 1, HV).contiguous()
        bias = inputs.get("dt_bias")

        def call() -> Tensor:
            q, k, v = (
                causal_conv1d_update(x, cache, weight=taps, activation="silu")[0].view(N, 1, -1, d)
                for (x, cache, taps), d in zip(parts, (K, K, V), strict=True)
            )
            o, _ = fused_recurrent_kda_fwd(
                q,
                k,
                v,
                f,
                beta,
                A_log=inputs["A_log"],
                dt_bias=None if bias is None else bias.reshape(-1),
                initial_state=state,
                inplace_final_state=True,
                state_v_first=True,
                ssm_state_indices=slots,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=inputs.get("beta_scale", 1.0) == 2.0,
                lower_bound=inputs.get("lower_bound"),
            )
            return rms_norm_gated(
                o,
                z,
                inputs["norm_weight"],
                None,
                activation="sigmoid",
                eps=inputs.get("norm_eps", 1e-5),
            )

        return call

    return prepare
