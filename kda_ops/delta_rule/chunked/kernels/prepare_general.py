"""The `prepare` of chunked KDA for any K, V and dtype, in blocks of columns; GEMMs in full fp32 for
fp32 inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.delta_rule.chunked.kernels.tiles import (
    clear_padding,
    full_dot,
    meets,
    slab_rows,
    store_u,
    tiles_of,
)
from kda_ops.delta_rule.chunked.workspace import Batch, Workspace, token_strides


@triton.jit
def chunk_prepare_general_kernel(
    q_ptr, k_ptr, v_ptr, G_ptr, beta_ptr, o_ptr, tiles_ptr, u_ptr, decay_ptr, cu_ptr,
    chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, G_b, G_t, G_h, beta_b, beta_t, beta_h,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """One program prepares one chunk of one value head, in blocks of BLOCK key or value columns.
    Grid: (chunks, HV).

    The workspace is KP columns wide, and zero past K. GEMMs are in v's dtype, those of the inverse
    in fp16, or all in full fp32.
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    p, b, first, count, row, inside = slab_rows(
        p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(o_ptr, cu_ptr, p, h, T, N, NC, HV, V, VP)
        return
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    inverse: tl.constexpr = tl.float32 if FP32 else tl.float16
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    ok = (r < count)[:, None]
    t = first + r
    q_head = q_ptr + b * q_b + hk * q_h + t[:, None] * q_t
    k_head = k_ptr + b * k_b + hk * k_h + t[:, None] * k_t
    G_head = G_ptr + b * G_b + h * G_h
    # padding lanes repeat the last token's G, so that their exponents stay <= 0
    G_row = G_head + (first + tl.minimum(r, count - 1))[:, None] * G_t
    beta = tl.load(beta_ptr + b * beta_b + h * beta_h + t * beta_t, mask=r < count, other=0.0).to(
        tl.float32
    )
    i = r[:, None]
    j = r[None, :]

    A = tl.zeros((64, 64), tl.float32)
    L = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, K, BLOCK):
        cols = (k0 + d)[None, :]
        q = tl.load(q_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        k = tl.load(k_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        G = tl.load(G_row + cols, mask=cols < K, other=0.0)
        A += tl.where(i == j, full_dot(q.to(dtype), tl.trans(k.to(dtype))), 0.0)
        for level in range(6):
            s = 1 << level
            a = tl.minimum((r // (2 * s)) * (2 * s) + s - 1, count - 1)
            e = tl.exp2(
                -tl.abs(
                    G
                    - tl.load(G_head + (first + a)[:, None] * G_t + cols, mask=cols < K, other=0.0)
                )
            )
            columns = tl.trans((k * e).to(dtype))
            meet = meets(i, j, s)
            A += tl.where(meet, full_dot((q * e).to(dtype), columns), 0.0)
            L += tl.where(meet, full_dot((k * e).to(dtype), columns), 0.0)
    L = L * beta[:, None]
    X = tl.where(i == j, 1.0, 0.0)
    for level in range(6):
        Xi = X.to(inverse)
        LX = full_dot(tl.where(meets(i, j, 1 << level), L, 0.0).to(inverse), Xi)
        X = X - full_dot(Xi, LX.to(inverse))
    X = (X * beta[None, :]).to(dtype)

    work = row * HV + h
    w_ptr, kg_ptr, qg_ptr, A_ptr = tiles_of(tiles_ptr, work, KP)
    tl.store(A_ptr + i * 64 + j, (A * SCALE).to(tiles_ptr.dtype.element_ty))
    for k0 in range(0, KP, BLOCK):
        cols = (k0 + d)[None, :]
        q = tl.load(q_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        k = tl.load(k_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        G = tl.load(G_row + cols, mask=cols < K, other=0.0)
        last = tl.load(G_head + (first + count - 1) * G_t + k0 + d, mask=k0 + d < K, other=0.0)
        tl.store(decay_ptr + work * KP + k0 + d, tl.exp2(last))
        at = i * KP + cols
        e = tl.exp2(G)
        tl.store(kg_ptr + at, (k * tl.exp2(last[None, :] - G)).to(tiles_ptr.dtype.element_ty))
        tl.store(qg_ptr + at, (q * e * SCALE).to(tiles_ptr.dtype.element_ty))
        w = full_dot(X, (k * e).to(dtype))
        tl.store(w_ptr + at, w.to(tiles_ptr.dtype.element_ty))
    v_head = v_ptr + b * v_b + h * v_h + t[:, None] * v_t
    for v0 in range(0, V, BLOCK):
        cols = (v0 + d)[None, :]
        u = full_dot(X, tl.load(v_head + cols, mask=ok & (cols < V), other=0.0))
        store_u(u_ptr, o_ptr, u, work, b * T + first, count, h, HV, V, v0, BLOCK)


def launch_general_prepare(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, o: Tensor,
    workspace: Workspace, batch: Batch,
) -> None:  # fmt: skip
    """`prepare` for any size and dtype, from normalized keys (in v's dtype or fp32), the cumulative
    gate in log2 and beta after its sigmoid.
    """
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    inputs, wide = (q, k, v, g_cumsum, beta), v.dtype == torch.float32
    # 16-bit: with 4 warps Triton 3.6 uses warp-group MMA in these loops and reads outside shared
    # memory on sm_90; 2 warps keep it on the older instruction
    traceable(chunk_prepare_general_kernel)[(batch.programs, HV)](
        *inputs, o, *workspace.prepared, *batch.tables, *token_strides(*inputs),
        SCALE=scale, H=H, HV=HV, K=K, V=V, **batch.constants, KP=workspace.columns,
        VP=triton.next_power_of_2(V), BLOCK=16, FP32=wide, num_warps=4 if wide else 2, num_stages=1,
    )  # fmt: skip
