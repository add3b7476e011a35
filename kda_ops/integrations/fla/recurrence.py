"""The recurrence by flash-linear-attention's names: chunked, and token by token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._gradients import records_gradient
from kda_ops._numerics import CHUNK, QK_NORM_EPS, RCP_LN2, accumulation_dtype
from kda_ops.delta_rule.chunk_kda import chunk_kda as chunked
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.gating.chunk_cumsum import chunk_cumsum
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.integrations.fla.refusals import check_names, check_offered, is_v_first
from kda_ops.norm.l2norm import l2norm as normalized


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.chunk_kda`: whole sequences, with gradients of everything.

    Of its arguments `disable_recompute`, `cu_seqlens_cpu`, `use_graph` and `max_num_seqs` change
    nothing here: the backward always recomputes, nothing waits for the GPU, and the chunk table has
    a fixed size. `safe_gate` only asks for a `lower_bound`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`, in nats, or with `use_gate_in_kernel` the gate's input.
        beta: `[B, T, HV]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, K, V]`.
        output_final_state: Whether to return the states after the last token.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate of `A_log` and `dt_bias` here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        safe_gate: Whether the gate is bounded.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        disable_recompute: Ignored.
        return_intermediate_states: Refused.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        cu_seqlens_cpu: Ignored.
        cp_context: Refused.
        use_graph: Ignored.
        max_num_seqs: Ignored.
        **kwargs: `A_log [HV]`, `dt_bias [HV * K]`, `chunk_size`, which must be 64, and
            `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        `o [B, T, HV, V]` in the dtype of q, and the final state in fp32 or None.

    Raises:
        ValueError: `cp_context`, `return_intermediate_states`, another chunk size, a `lower_bound`
            outside `[-5, 0)`, or what the operators refuse.
        TypeError: An argument that is not known.
    """
    check_names(kwargs, "A_log", "dt_bias", "chunk_size", "transpose_state_layout")
    check_offered(cp_context, return_intermediate_states, kwargs.get("chunk_size", CHUNK))
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("lower_bound must be given with safe_gate and use_gate_in_kernel")
    _check_beta(allow_neg_eigval, use_beta_sigmoid_in_kernel)
    v_first = is_v_first(state_v_first, kwargs)
    A_log, dt_bias = kwargs.get("A_log"), kwargs.get("dt_bias")
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": _to_v_first(initial_state, v_first),
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    beta_scale = 2.0 if allow_neg_eigval else 1.0
    # a graph for inference is rewritten to it from small operators, and the convolutions with them
    whole = torch.is_grad_enabled() or not torch.compiler.is_compiling()
    if whole and use_gate_in_kernel and use_beta_sigmoid_in_kernel:
        eps = QK_NORM_EPS if use_qk_l2norm_in_kernel else None
        o, final = chunk_kda_gated(
            q, k, v, g, beta, A_log, dt_bias, lower_bound=lower_bound, beta_scale=beta_scale,
            qk_norm_eps=eps, **options,
        )  # fmt: skip
        return o.type_as(q), _from_v_first(final, v_first)
    if use_qk_l2norm_in_kernel:
        q, k = normalized(q), normalized(k)
    if use_beta_sigmoid_in_kernel:
        beta = _sigmoid(beta, beta_scale)
    if use_gate_in_kernel:
        g = gate_cumsum(g, A_log, dt_bias, lower_bound=lower_bound, cu_seqlens=cu_seqlens)
    else:
        g = chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu_seqlens)
    o, final = chunked(q, k, v, g, beta, **options)
    return o.type_as(q), _from_v_first(final, v_first)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.fused_recurrent_kda`: token by token, for short sequences.

    FLA's has no gradient. Where one is asked for, the chunks of `chunk_kda` compute the same here.

    Args:
        q: `[B, T, H, K]`; the others as in `chunk_kda`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`.
        beta: `[B, T, HV]`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, K, V]`.
        output_final_state: Whether to return the states after the last token.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        **kwargs: `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        `o [B, T, HV, V]` in the dtype of v, and the final state in fp32 or None.

    Raises:
        ValueError: What the operators refuse.
        TypeError: An argument that is not known.
    """
    check_names(kwargs, "transpose_state_layout")
    _check_beta(allow_neg_eigval, use_beta_sigmoid_in_kernel)
    options: dict[str, Any] = {
        "A_log": A_log,
        "dt_bias": dt_bias,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
        "state_v_first": is_v_first(state_v_first, kwargs),
        "cu_seqlens": cu_seqlens,
    }
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    if records_gradient(*inputs):
        return chunk_kda(q, k, v, g, beta, **options)
    return fused_recurrent_kda_fwd(q, k, v, g, beta, inplace_final_state=False, **options)


def fused_recurrent_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd`, without gradients.

    Args:
        q: `[B, T, H, K]`; the others as in `fused_recurrent_kda`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`.
        beta: `[B, T, HV]`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        initial_state: `[N, HV, K, V]`, or with `ssm_state_indices` pages of that shape.
        scale: `K ** -0.5` if None.
        output_final_state: Whether to return the states after the last token.
        inplace_final_state: Whether they are written to `initial_state`, which is returned.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        ssm_state_indices: `[N]`, the page of each sequence, or `[N, tokens]`, one for the state
            after each token. Page 0 is a page as any other. Pages that are written are distinct.
        num_accepted_tokens: `[N]`: the sequence continues from column `num_accepted_tokens - 1`.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        out: Shape of v, receives the result.
        **kwargs: None are known.

    Returns:
        `o [B, T, HV, V]`, and the final state, `initial_state` or None.

    Raises:
        ValueError: A `beta` per channel, `ssm_state_indices` without `inplace_final_state`, or what
            the operators refuse.
        TypeError: An argument that is not known.
    """
    check_names(kwargs)
    if beta.dim() == v.dim():
        raise ValueError(
            f"beta must have shape {tuple(v.shape[:3])}, one per head, got {tuple(beta.shape)}"
        )
    if inplace_final_state and initial_state is None:
        raise ValueError("initial_state must be given with inplace_final_state")
    if ssm_state_indices is not None and not inplace_final_state:
        raise ValueError("inplace_final_state must be True with ssm_state_indices")
    if use_qk_l2norm_in_kernel:
        q, k = normalized(q), normalized(k)
    if use_gate_in_kernel:
        g = gate(g, A_log, dt_bias, lower_bound=lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = _sigmoid(beta, 2.0 if allow_neg_eigval else 1.0)

    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, V, K = v.shape[2], v.shape[3], q.shape[3]
    states = _to_v_first(initial_state, state_v_first)
    # the operator takes page 0 for nobody's, so pages are copied behind an empty one
    table = torch.arange(1, N + 1, device=q.device)
    if states is None:
        pages = q.new_zeros(N + 1, HV, V, K, dtype=accumulation_dtype(q))
    elif ssm_state_indices is None:
        pages = F.pad(states, (0, 0) * 3 + (1, 0))
    else:
        pages = F.pad(states[ssm_state_indices.reshape(-1)], (0, 0) * 3 + (1, 0))
        table = torch.arange(1, pages.shape[0], device=q.device).view(ssm_state_indices.shape)
    o = recurrent_kda(
        q, k, v, g, beta, pages, table, num_accepted=num_accepted_tokens, scale=scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    final: Tensor | None = None
    if states is not None and inplace_final_state:
        if ssm_state_indices is None:
            states.copy_(pages[1:])
        else:
            states[ssm_state_indices.reshape(-1)] = pages[1:]
        final = initial_state
    elif output_final_state:
        final = _from_v_first(pages[1:], state_v_first)
    if out is not None:
        o = out.copy_(o)
    return o, final


def _check_beta(allow_neg_eigval: bool, use_beta_sigmoid_in_kernel: bool) -> None:
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("use_beta_sigmoid_in_kernel must be True with allow_neg_eigval")


def _sigmoid(beta: Tensor, scale: float) -> Tensor:
    return torch.sigmoid(beta.to(accumulation_dtype(beta))) * scale


def _to_v_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state if state is None or v_first else state.transpose(-1, -2)


def _from_v_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state if state is None or v_first else state.transpose(-1, -2).contiguous()
