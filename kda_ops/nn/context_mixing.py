"""Token mixing over the ranks of a context: the convolution, the recurrence, a layer of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._checks import (
    check_chunk_states,
    check_cu_seqlens_shape,
    check_cu_seqlens_values,
    check_device,
    check_number,
    rates_of,
)
from kda_ops._numerics import QK_NORM_EPS, accumulation_dtype
from kda_ops._registry import selected
from kda_ops._tracing import reads_values
from kda_ops.conv.short_conv import short_conv
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.delta_rule.chunked.checks import check_raw_inputs
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.nn.context import ContextParallel, History, Packed
from kda_ops.nn.context_scan import Constants, Scan

if TYPE_CHECKING:
    from kda_ops.nn.input_projection import Projected
    from kda_ops.nn.layer import KimiDeltaAttention as Layer


def by_part(x: Tensor, parts: int) -> Tensor:
    """`[B, T, ...]` as `[B, parts, T / parts, ...]`."""
    return x.unflatten(1, (parts, x.shape[1] // parts))


def packed_of(context: ContextParallel, x: Tensor, cu_seqlens: Tensor | None) -> Packed | None:
    """The packed sequences as this rank sees them, of rows `x [B, T, ...]`."""
    context.check_tokens("the rank", x)
    if cu_seqlens is None:
        return None
    check_cu_seqlens_shape(cu_seqlens)
    check_device(cu_seqlens=cu_seqlens, x=x)
    if x.shape[0] != 1:
        raise ValueError(f"x must have batch size 1 with cu_seqlens, got {x.shape[0]}")
    ranks = context.ranks
    if cu_seqlens.device.type == "cpu" and reads_values(cu_seqlens):
        check_cu_seqlens_values(cu_seqlens, ranks.size * x.shape[1])
    return Packed.of(cu_seqlens, context.own, x.shape[1] // ranks.parts, ranks.size * ranks.parts)


def context_chunk_kda(
    context: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_gate: Tensor,
    raw_beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    *,
    lower_bound: float | None = None,
    beta_scale: float = 1.0,
    qk_norm_eps: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    state_layout: str = "VK",
) -> tuple[Tensor, Tensor | None]:
    """`kda_ops.fused.chunk_kda_gated` of sequences whose tokens are spread over ranks.

    A collective of the context: one all-gather of `[B, HV, K + V, K]` per part, and one of `[B, HV,
    V, K]` per part backward (B is 1 for packed sequences), in the accumulation dtype. All ranks
    have equally many tokens; `ContextParallel.shard` pads accordingly. Differentiable: gradients
    are those of the sum of all ranks' losses, and of what all ranks have (`A_log`, `dt_bias`) each
    rank gets its tokens' term of a sum over the ranks.

    Args:
        context: The ranks and the order of their parts.
        q: `[B, T, H, K]` with this rank's T tokens, as in `chunk_kda_gated`.
        k: Likewise.
        v: `[B, T, HV, V]`.
        raw_gate: `[B, T, HV, K]`, the input of the gate (which is in nats).
        raw_beta: `[B, T, HV]` before its sigmoid.
        A_log: `[HV]`, natural log of the decay rate, or None.
        dt_bias: `[HV, K]` or `[HV * K]`, or None.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        beta_scale: 1 or 2.
        qk_norm_eps: None if q and k are normalized.
        scale: Scale of the output, `K ** -0.5` if None.
        initial_state: `[N, HV, V, K]` (or as `state_layout` says) before the first token of each
            sequence: read, and its gradient returned, on the rank that has that token. What is
            passed elsewhere is ignored, and its gradient is zero.
        output_final_state: Whether to return the states after the last tokens.
        cu_seqlens: `[N + 1]`, int32 or int64, the same on every rank: offsets of packed sequences
            in the tokens of **all** ranks. Then B is 1. Tokens past the last sequence are padding.
            Without it every batch row is a sequence, `N = B`.
        state_layout: `"VK"` or `"KV"`.

    Returns:
        `(o, final_state)`: `o [B, T, HV, V]` of this rank's tokens, zero in padding, and the final
        states of the sequences whose last token is on this rank, zeros elsewhere; the sum over the
        ranks is all of them. None unless `output_final_state`.

    Raises:
        ValueError: As `chunk_kda_gated`, and a number of tokens that the rank's parts do not divide
            or that is 0.
    """
    check_raw_inputs(
        q, k, v, raw_gate, raw_beta, A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps
    )
    packed = packed_of(context, q, cu_seqlens)
    check_chunk_states(
        q, v, initial_state, output_final_state, None, None, None, cu_seqlens, state_layout
    )
    if scale is None:
        scale = q.shape[3] ** -0.5
    check_number("scale", scale)
    return scanned(
        context, packed, q, k, v, raw_gate, raw_beta, rates_of(A_log), dt_bias,
        (lower_bound, beta_scale, qk_norm_eps, scale), initial_state, output_final_state,
        state_layout,
    )  # fmt: skip


def scanned(
    context: ContextParallel, packed: Packed | None, q: Tensor, k: Tensor, v: Tensor,
    raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    factors: tuple[float | None, float, float | None, float], initial_state: Tensor | None = None,
    output_final_state: bool = False, state_layout: str = "VK",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`context_chunk_kda` of checked arguments."""
    ranks = context.ranks
    rows = (q, k, v, raw_gate, raw_beta)
    if packed is None:
        rows = tuple(by_part(x, ranks.parts).flatten(0, 1) for x in rows)
    dtype = accumulation_dtype(q) if initial_state is None else initial_state.dtype
    if initial_state is not None:
        initial_state = v_first(initial_state, state_layout)
    namespace = selected(chunk_kda_gated_op).namespace
    o, final = Scan.apply(
        Constants(ranks, namespace, *factors, output_final_state),
        *rows, A_log, dt_bias, initial_state, context.own, *(packed or ()),
    )  # fmt: skip
    o = o.reshape(v.shape)
    return o, v_first(final.to(dtype), state_layout) if output_final_state else None


def context_history(
    context: ContextParallel, x: Tensor, rows: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The rows before each of this rank's parts: what a causal convolution needs of other ranks.

    A collective of the context: one all-gather of `[B, rows, D]` per part, and one backward, which
    returns the gradients to the ranks that have the rows. Parts may be shorter than `rows`.

    Args:
        context: The ranks and the order of their parts.
        x: `[B, T, D]` with this rank's T tokens.
        rows: How many, at least 1; W - 1 for a convolution of width W.
        cu_seqlens: As in `context_chunk_kda`.

    Returns:
        `[B, parts per rank, rows, D]`, zero where the sequence has not begun.

    Raises:
        ValueError: A number of tokens that the rank's parts do not divide or that is 0.
    """
    return history_of(context, packed_of(context, x, cu_seqlens), x, rows)


def history_of(context: ContextParallel, packed: Packed | None, x: Tensor, rows: int) -> Tensor:
    start = torch.zeros_like(context.own) if packed is None else packed.start
    return History.apply(by_part(x, context.ranks.parts), context.own, start, rows, context.ranks)


def context_short_conv(
    context: ContextParallel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`kda_ops.short_conv` of sequences whose tokens are spread over ranks.

    A collective of the context, that of `context_history`. Differentiable.

    Args:
        context: The ranks and the order of their parts.
        x: `[B, T, D]` with this rank's T tokens.
        weight: `[D, W]`.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        cu_seqlens: As in `context_chunk_kda`.

    Returns:
        `[B, T, D]`, zero in padding.

    Raises:
        ValueError: As `short_conv`, and a number of tokens that the rank's parts do not divide or
            that is 0.
    """
    packed = packed_of(context, x, cu_seqlens)
    history = history_of(context, packed, x, weight.shape[-1] - 1)
    return convolved(context, packed, x, history, weight, bias, activation)


def convolved(
    context: ContextParallel, packed: Packed | None, x: Tensor, history: Tensor, weight: Tensor,
    bias: Tensor | None, activation: str | None = "silu",
) -> Tensor:  # fmt: skip
    """The convolution of `x [B, T, D]` with the rows before each part.

    All of it without them, and then the first rows of each part anew: no copy of x.
    """
    parts = context.ranks.parts
    rows = by_part(x, parts)  # [B, m, size, D]
    if packed is None:
        y = short_conv(rows.flatten(0, 1), weight, bias, activation=activation)
    else:
        y = short_conv(x, weight, bias, activation=activation, cu_seqlens=packed.cu_seqlens)
    y = y.reshape(rows.shape)
    count = min(history.shape[2], rows.shape[2])
    first = torch.cat([history, rows[:, :, :count]], 2).flatten(0, 1)
    first = short_conv(first, weight, bias, activation=activation)[:, -count:]
    first = first.reshape(*rows.shape[:2], count, rows.shape[3])
    if packed is not None:
        token = (context.own * rows.shape[2])[:, None] + torch.arange(count, device=x.device)
        entered = token < packed.stop[:, None]
        first = torch.where(entered[:, :, None], first, y[:, :, :count])
    return torch.slice_scatter(y, first, 2, 0, count).reshape(x.shape)


def context_prefill(
    layer: Layer, hidden_states: Tensor, inputs: Projected, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The token mixing of a layer before its output norm, and the offsets of this rank's tokens."""
    context = layer.context
    assert context is not None
    packed = packed_of(context, hidden_states, cu_seqlens)
    if layer.use_short_conv:
        # hidden states: fewer columns than q | k | v, and the exchange waits for no projection
        history = history_of(context, packed, hidden_states, layer.conv_size - 1)
        projected = layer.in_proj(history.flatten(0, 2))[:, : layer.conv_dim]
        history = projected.unflatten(0, history.shape[:3])
        x = convolved(context, packed, inputs.x, history, layer.conv_weight, layer.conv_bias)
    else:
        x = F.silu(inputs.x)
    q, k, v = x.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    q, k = (y.unflatten(-1, (layer.num_heads, layer.head_k_dim)) for y in (q, k))
    v = v.unflatten(-1, (layer.num_v_heads, layer.head_v_dim))
    factors = (
        layer.lower_bound, 2.0 if layer.allow_neg_eigval else 1.0, QK_NORM_EPS,
        layer.head_k_dim**-0.5,
    )  # fmt: skip
    o, _ = scanned(
        context, packed, q, k, v, inputs.raw_gate, inputs.raw_beta, layer.A_log, layer.dt_bias,
        factors,
    )  # fmt: skip
    return o, None if packed is None else packed.cu_seqlens
