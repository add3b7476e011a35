"""Chunked KDA as two Triton kernels: `prepare` works on all chunks in parallel, `scan` carries the
state through them.

This file has the fast `prepare`, for 16-bit inputs with K and V of 64 or 128. The rest is in
`kda_ops.delta_rule.chunked`: the general `prepare`, for fp32 (computed in fp32 throughout) and any
K and V, both forms of `scan`, and the workspace between the two.
"""

import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import is_nvidia, traceable
from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.kernels.prepare import prepare_chunk
from kda_ops.delta_rule.chunked.kernels.prepare_general import launch_general_prepare
from kda_ops.delta_rule.chunked.kernels.raw_inputs import within_fp16
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows
from kda_ops.delta_rule.chunked.launch import launch_chunks
from kda_ops.delta_rule.chunked.states import States, empty_final_state
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    Workspace,
    dense_rows,
    has_fast_prepare,
    token_strides,
)
from kda_ops.tuning import choose


@triton.jit
def chunk_prepare_kernel(
    q_ptr, k_ptr, v_ptr, G_ptr, beta_ptr, o_ptr, tiles_ptr, u_ptr, decay_ptr, cu_ptr,
    chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, G_b, G_t, G_h, beta_b, beta_t, beta_h,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program prepares one chunk of one value head; K and V are 64 or 128.
    Grid: (chunks * HV), heads fastest.

    The tokens' gates y are rounded to fp16, and every exponent, also G and G_last - G, is a 0/1
    matrix times y: the tensor core returns it in the layout of the next GEMM. The error is at most
    2^-12 of the exponent, weighted by its power of two: below 2e-4.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p = p // HV
    p, b, first, count, row, inside = slab_rows(
        p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(o_ptr, cu_ptr, p, h, T, N, NC, HV, V, V)
        return
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    d = tl.arange(0, K)
    ok = r < count
    t = tl.minimum(r, count - 1)
    q_at = (q_ptr + b * q_b + hk * q_h + first * q_t) + (t[:, None] * q_t + d[None, :])
    k_at = (k_ptr + b * k_b + hk * k_h + first * k_t) + (t[:, None] * k_t + d[None, :])
    G_head = G_ptr + b * G_b + h * G_h + first * G_t
    G_at = G_head + (t[:, None] * G_t + d[None, :])

    y = tl.load(G_at) - tl.load(G_at - G_t, mask=(t > 0)[:, None], other=0.0)
    y = tl.where(ok[:, None], y, 0.0)
    y = within_fp16(y).to(tl.float16)
    k = tl.load(k_at)
    q = tl.load(q_at)
    beta_row = beta_ptr + b * beta_b + h * beta_h + first * beta_t
    beta = tl.where(ok, tl.load(beta_row + t * beta_t).to(tl.float32), 0.0)
    before = tl.load(beta_row + tl.maximum(t - 1, 0) * beta_t).to(tl.float32)
    last = tl.load(G_head + (count - 1) * G_t + d)
    work = row * HV + h
    tl.store(decay_ptr + work * K + d, tl.exp2(last))
    prepare_chunk(
        q, k, y, beta, before, v_ptr + b * v_b + h * v_h + first * v_t, v_t, o_ptr, tiles_ptr,
        u_ptr, work, b * T + first, count, h, SCALE, HV, K, V, VARLEN, PACKED,
    )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, states: States,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns the output and writes the final states."""
    inputs = q, k, v, g_cumsum, beta = dense_rows(q, k, v, g_cumsum, beta)
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]

    def prepare(o: Tensor, workspace: Workspace, part: Batch) -> None:
        if not has_fast_prepare(q.dtype, K, V):
            launch_general_prepare(*inputs, scale, o, workspace, part)
            return
        traceable(chunk_prepare_kernel)[(part.programs * HV,)](
            *inputs, o, *workspace.prepared, *part.tables, *token_strides(*inputs),
            SCALE=scale, H=H, HV=HV, K=K, V=V, **part.constants, PACKED=is_nvidia(q.device),
            **choose("chunk_prepare", q.device, K=K, V=V, dtype=q.dtype),
        )  # fmt: skip

    return launch_chunks(q, v, Batch.of(q, cu_seqlens, chunk_indices), prepare, states)


def launch_chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    final = empty_final_state(q, v, initial_state, output_final_state, cu_seqlens)
    states = States(initial_state, final if output_final_state else None)
    return _launch(q, k, v, g_cumsum, beta, scale, states, cu_seqlens, chunk_indices), final


def launch_chunk_kda_state(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, state_layout: str, block_table: Tensor | None,
    context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    states = States(None, state, state_indices, has_initial_state, True, state_layout, blocks)
    return _launch(q, k, v, g_cumsum, beta, scale, states, cu_seqlens, chunk_indices)
