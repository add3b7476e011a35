"""Chunked KDA as two Triton kernels: `prepare` works on all chunks at once, `scan` carries the
state through them.

Here is the fast `prepare`, for 16-bit inputs with K and V of 64 or 128. `kda_ops.device` has the
rest: the general `prepare`, which takes fp32 (computed in fp32 throughout) and any K and V, both
forms of `scan`, and what lies between the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.delta_rule.chunked.kernels.prepare import is_nvidia, prepare_chunk
from kda_ops.delta_rule.chunked.kernels.prepare_general import launch_general_prepare
from kda_ops.delta_rule.chunked.kernels.scan import launch_scan
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows
from kda_ops.delta_rule.chunked.workspace import Batch, dense_rows, has_fast_prepare, make_workspace
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

    The tokens' gates y go to fp16 and every exponent, also G and G_last - G, comes as a 0/1 matrix
    times y: the tensor core hands it over in the layout that the next product wants. Its error is
    at most 2^-12 of the exponent, weighted by its power of two: below 2e-4.
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
    # what is below -30000 decays to zero either way, and fp16 ends at -65504
    y = tl.where(y < -30000.0, -30000.0, y).to(tl.float16)
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
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial: Tensor | None, final: Tensor | None, indices: Tensor | None,
    has_initial: Tensor | None, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns the output and writes the final states to `final`; see `launch_scan`."""
    H, K = q.shape[2:]
    HV, V = v.shape[2:]
    q, k, v, g_cumsum, beta = dense_rows(q, k, v, g_cumsum, beta)
    batch = Batch.of(q, cu_seqlens, chunk_indices)
    parts = batch.slabs(q, v)
    workspace = make_workspace(q, v, parts[0])
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    fast = has_fast_prepare(q.dtype, K, V)
    for part in parts:
        if fast:
            traceable(chunk_prepare_kernel)[(part.programs * HV,)](
                q, k, v, g_cumsum, beta, o, *workspace.prepared, *part.tables,
                *(stride for x in (q, k, v, g_cumsum, beta) for stride in x.stride()[:3]),
                SCALE=scale, H=H, HV=HV, K=K, V=V, VARLEN=cu_seqlens is not None,
                SLABS=part.slab is not None, PACKED=is_nvidia(q.device),
                **choose("chunk_prepare", q.device, K=K, V=V, dtype=q.dtype),
            )  # fmt: skip
        else:
            launch_general_prepare(q, k, v, g_cumsum, beta, scale, o, workspace, part)
        launch_scan(o, workspace, part, K, initial, final, indices, has_initial)
    return o


def launch_chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], v.shape[3], q.shape[3]) if output_final_state else (0,)
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    final = torch.empty(shape, dtype=dtype, device=q.device)
    o = _launch(
        q, k, v, g_cumsum, beta, scale, initial_state, final if output_final_state else None, None,
        None, cu_seqlens, chunk_indices,
    )  # fmt: skip
    return o, final


def launch_chunk_kda_state(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, state: Tensor,
    state_indices: Tensor, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    return _launch(
        q, k, v, g_cumsum, beta, scale, None, state, state_indices, has_initial_state, cu_seqlens,
        chunk_indices,
    )  # fmt: skip
