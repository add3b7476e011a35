"""Chunked KDA in C++: arguments as those of the operators."""

from ctypes import c_double, c_int64, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.formulas import split_affine
from kda_ops.delta_rule.chunked.states import NOT_RAW, Raw, identity_states
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.native import address, dense, fp32, kernel
from kda_ops.varlen import page_index, pages_of, sequence_offsets

_INPUT = (c_void_p, c_int64, c_int64)
_ARGUMENTS = (*5 * _INPUT, *9 * (c_void_p,), *8 * (c_int64,), *4 * (c_double,), c_int64)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, gate, beta


class Kept(NamedTuple):
    """States `[kept, HV, V, K]` within sequences: the sequence of each, in order, and how many of
    its tokens are before.
    """

    states: Tensor
    sequence: Tensor
    end: Tensor


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = (q, k, v, g_cumsum, beta)
    return _whole(inputs, None, scale, initial_state, output_final_state, cu_seqlens)


def chunk_kda_state(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, state_layout: str, block_table: Tensor | None,
    context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    inputs = (q, k, v, g_cumsum, beta)
    state = v_first(state, state_layout)
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    return _paged(inputs, None, scale, state, state_indices, has_initial_state, cu_seqlens, blocks)


def chunk_kda_gated(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    inputs = (q, k, v, raw_gate, raw_beta)
    return _whole(inputs, raw, scale, initial_state, output_final_state, cu_seqlens)


def chunk_kda_gated_state(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, state: Tensor, state_indices: Tensor | None, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None, state_layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    inputs = (q, k, v, raw_gate, raw_beta)
    state = v_first(state, state_layout)
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    return _paged(inputs, raw, scale, state, state_indices, has_initial_state, cu_seqlens, blocks)


def chunk_kda_gated_affine(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, entered: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    offsets = sequence_offsets(q[:, :, 0], cu_seqlens)
    N, (HV, V), K = len(offsets) - 1, v.shape[2:], q.shape[3]
    S = offsets.new_zeros(N, HV, V + K, K, dtype=torch.float32)
    if initial_state is not None:
        S[:, :, :V].copy_(initial_state)
    S[:, :, V:].copy_(identity_states(N, HV, K, entered, S.dtype, S.device))
    live = offsets.new_ones(N, dtype=torch.bool)
    inputs = (q, k, F.pad(v, (0, K)), raw_gate, raw_beta)
    return split_affine(_run(inputs, S, offsets, live, raw, scale), S, V)


def _whole(
    inputs: Inputs, raw: Raw | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, _, v, *_ = inputs
    offsets = sequence_offsets(q[:, :, 0], cu_seqlens)
    N, dtype = len(offsets) - 1, torch.float32 if initial_state is None else initial_state.dtype
    S = offsets.new_zeros(N, *v.shape[2:], q.shape[3], dtype=torch.float32)
    if initial_state is not None:
        S.copy_(initial_state)
    live = offsets.new_ones(N, dtype=torch.bool)
    o = _run(inputs, S, offsets, live, raw, scale)
    return o, S.to(dtype) if output_final_state else S.new_empty(0, dtype=dtype)


def _paged(
    inputs: Inputs, raw: Raw | None, scale: float, state: Tensor, state_indices: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, blocks: Blocks | None,
) -> Tensor:  # fmt: skip
    offsets = sequence_offsets(inputs[0][:, :, 0], cu_seqlens)
    index, live = pages_of(state_indices, len(offsets) - 1, offsets.device)
    read = live if has_initial_state is None else live & has_initial_state
    pages = page_index(index)
    S = torch.where(read[:, None, None, None], state[pages], 0.0).to(torch.float32).contiguous()
    ends = None if blocks is None else blocks.ends(offsets, live, len(state))
    if ends is None:
        o = _run(inputs, S, offsets, live, raw, scale)
    else:
        sequence, end, block = ends
        kept = S.new_empty(len(end), *S.shape[1:])
        o = _run(inputs, S, offsets, live, raw, scale, Kept(kept, sequence, end))
        state[block] = kept.to(state.dtype)
    if bool(live.all()):
        state[pages] = S.to(state.dtype)
    else:
        state[index[live]] = S[live].to(state.dtype)
    return o


def _run(
    inputs: Inputs, S: Tensor, offsets: Tensor, live: Tensor, raw: Raw | None, scale: float,
    kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """The output, in the dtype of v. `S [N, HV, V, K]` goes from initial to final states, and those
    within sequences to `kept`.

    Inputs that are not `raw` are those of `chunk_kda`.
    """
    q, _, v, *_ = inputs
    (*_, H, K), (HV, V) = q.shape, v.shape[2:]
    rows = [fp32(x.flatten(0, 1)) for x in inputs]
    o = S.new_zeros(len(rows[0]), HV, V)
    raw_inputs = raw is not None
    raw = raw or NOT_RAW
    A_log, dt_bias = dense(raw.A_log), dense(raw.dt_bias)
    kernel("chunk_kda", *_ARGUMENTS)(
        *[part for x in rows for part in (x.data_ptr(), x.stride(0), x.stride(1))],
        *map(address, (o, S, offsets, live, A_log, dt_bias, *(kept or (None, None, None)))),
        0 if kept is None else len(kept.end),
        *(len(live), H, HV, K, V, raw_inputs, raw.lower_bound is not None),
        *(raw.lower_bound or 0.0, raw.beta_scale),
        *(-1.0 if raw.qk_norm_eps is None else raw.qk_norm_eps, scale),
        torch.get_num_threads(),
    )
    return o.to(v.dtype).view(v.shape)
