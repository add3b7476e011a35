"""The layer's token mixing, between its projections.

Traced, it is made of small operators, which the rewrites of `kda_ops.lowering` fuse, together with
whatever a model has around them; eager code calls the fused operators itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._gradients import records_gradient
from kda_ops._numerics import QK_NORM_EPS, accumulation_dtype
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.state_copy import state_copy
from kda_ops.conv.short_conv import short_conv
from kda_ops.conv.short_conv_update import short_conv_update
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.kda_decode import kda_decode
from kda_ops.delta_rule.kda_decode.op import MOST_TOKENS, conv_tokens
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.nn.input_projection import Projected
from kda_ops.nn.states import State
from kda_ops.norm.l2norm import l2norm
from kda_ops.norm.rms_norm_gated import rms_norm_gated

if TYPE_CHECKING:
    from kda_ops.nn.layer import KimiDeltaAttention as Layer


def step(layer: Layer, inputs: Projected, state: State, batch: KDABatch, layout: str) -> Tensor:
    """One step of a server: decode rows, then prefill rows and padding."""
    if batch.prefill_copies is not None:
        conv, recurrent = state
        window = layout
        if conv is None:  # state_copy needs two states
            conv, window = (
                recurrent.new_zeros(len(recurrent), batch.state_indices.shape[1], 1),
                "SD",
            )
        num_spec = batch.state_indices.shape[1] - 1
        state_copy(conv, recurrent, batch.prefill_copies, layout=window, num_spec=num_spec)
    if batch.kind == "decode":
        return decode(layer, inputs, state, batch, layout)
    if batch.kind == "prefill":
        return prefill_pages(layer, inputs, state, batch, layout)
    _, decode_rows, _, _, prefill_rows, *_ = batch.counts.shape
    decodes, prefills = inputs.split((decode_rows, prefill_rows))
    decoded = decode(layer, decodes, state, batch, layout)
    return torch.cat([decoded, prefill_pages(layer, prefills, state, batch, layout)], dim=1)


def decode(layer: Layer, inputs: Projected, state: State, batch: KDABatch, layout: str) -> Tensor:
    """A few tokens of each decode, with the recurrent form on its pages."""
    conv, recurrent = state
    cu_seqlens, state_indices = batch.decodes()
    if decodes_at_once(layer, inputs, conv, cu_seqlens, layout):
        return kda_decode(
            inputs.x[0],
            conv,
            layer.conv_weight,
            layer.conv_bias,
            raw_gate=inputs.raw_gate,
            raw_beta=inputs.raw_beta,
            output_gate=inputs.output_gate,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            lower_bound=layer.lower_bound,
            beta_scale=beta_scale(layer),
            norm_weight=layer.o_norm_weight,
            norm_eps=layer.norm_eps,
            state=recurrent,
            state_indices=state_indices,
            num_accepted=batch.num_accepted,
            cu_seqlens=cu_seqlens,
            layout=layout,
        )
    if layer.use_short_conv:
        x = short_conv_update(
            inputs.x[0],
            conv,
            layer.conv_weight,
            layer.conv_bias,
            state_indices=state_indices,
            num_accepted=batch.num_accepted,
            cu_seqlens=cu_seqlens,
            layout=layout,
        )[None]
    else:
        x = F.silu(inputs.x)
    q, k, v = normalized_heads(layer, x)
    g = gate(inputs.raw_gate, layer.A_log, layer.dt_bias, lower_bound=layer.lower_bound)
    o = recurrent_kda(
        q,
        k,
        v,
        g,
        step_size(layer, inputs.raw_beta),
        recurrent,
        state_indices,
        num_accepted=batch.num_accepted,
        cu_seqlens=cu_seqlens,
    )
    # padding follows the last sequence of the whole batch
    return normalized(layer, o, inputs.output_gate, None if batch.kind == "mixed" else cu_seqlens)


def decodes_at_once(
    layer: Layer, inputs: Projected, conv: Tensor | None, cu_seqlens: Tensor | None, layout: str
) -> bool:
    """Whether eager code takes `kda_decode`, which is not differentiable in any argument: a step
    has refused gradients of all but what comes after the states.
    """
    if torch.compiler.is_compiling() or conv is None:
        return False
    if cu_seqlens is not None and conv_tokens(conv, layer.conv_weight, layout) > MOST_TOKENS:
        return False
    return not records_gradient(inputs.output_gate, layer.o_norm_weight)


def prefill_pages(
    layer: Layer, inputs: Projected, state: State, batch: KDABatch, layout: str
) -> Tensor:
    """The prompts of a step, on their pages."""
    state_indices, continues = batch.prefills()
    return prefill(
        layer,
        inputs,
        state,
        state_indices if state_indices.dim() == 1 else state_indices[:, 0],
        continues,
        batch.prefill_cu_seqlens,
        batch.chunk_indices,
        layout,
        batch.blocks(),
    )


def prefill(
    layer: Layer,
    inputs: Projected,
    state: State | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    layout: str,
    blocks: dict[str, Any] | None = None,
) -> Tensor:
    """Whole sequences, in chunked form; with a state on its slots, and with `blocks`, arguments of
    the operators, on those of block boundaries.
    """
    blocks = blocks or {}
    conv, recurrent = (None, None) if state is None else state
    if layer.use_short_conv:
        x = short_conv(
            inputs.x,
            layer.conv_weight,
            layer.conv_bias,
            conv_state=conv,
            state_indices=state_indices,
            has_initial_state=has_initial_state,
            cu_seqlens=cu_seqlens,
            layout=layout,
            **blocks,
        )
    else:
        x = F.silu(inputs.x)
    where = {
        "cu_seqlens": cu_seqlens,
        "chunk_indices": chunk_indices,
        "state": recurrent,
        "state_indices": state_indices,
        "has_initial_state": has_initial_state,
        **blocks,
    }
    if torch.compiler.is_compiling():
        g_cumsum = gate_cumsum(
            inputs.raw_gate,
            layer.A_log,
            layer.dt_bias,
            lower_bound=layer.lower_bound,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
        o, _ = chunk_kda(
            *normalized_heads(layer, x), g_cumsum, step_size(layer, inputs.raw_beta), **where
        )
    else:
        o, _ = chunk_kda_gated(
            *heads(layer, x),
            inputs.raw_gate,
            inputs.raw_beta,
            layer.A_log,
            layer.dt_bias,
            lower_bound=layer.lower_bound,
            beta_scale=beta_scale(layer),
            qk_norm_eps=QK_NORM_EPS,
            **where,
        )
    return normalized(layer, o, inputs.output_gate, cu_seqlens)


def step_size(layer: Layer, raw_beta: Tensor) -> Tensor:
    """beta, the step size of the delta rule."""
    beta = torch.sigmoid(raw_beta.to(accumulation_dtype(raw_beta)))
    return 2 * beta if layer.allow_neg_eigval else beta


def beta_scale(layer: Layer) -> float:
    return 2.0 if layer.allow_neg_eigval else 1.0


def normalized(layer: Layer, o: Tensor, output_gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The output norm; rows past the last sequence are zero whatever their gate."""
    o = rms_norm_gated(o, output_gate, layer.o_norm_weight, eps=layer.norm_eps)
    if cu_seqlens is None:
        return o
    real = torch.arange(o.shape[1], device=o.device) < cu_seqlens[-1]
    # expanded: torch 2.11 computes an unsqueeze at an unbacked size in its own kernel
    return torch.where(real.expand(1, 1, -1).permute(2, 0, 1), o, 0)


def heads(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from the convolved channels."""
    q, k, v = x.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    q, k = (y.unflatten(-1, (layer.num_heads, layer.head_k_dim)) for y in (q, k))
    return q, k, v.unflatten(-1, (layer.num_v_heads, layer.head_v_dim))


def normalized_heads(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads(layer, x)
    return l2norm(q), l2norm(k), v
