"""The gradients of the 64 x 64 matrices of chunked KDA, read by `chunk_gradient_kernel`."""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import gradient_rows_of, gradient_tiles_of
from kda_ops.delta_rule.chunked.kernels.tiles import slab_rows


@triton.jit
def pair_tiles_of(pairs_ptr):
    """Pointers to the tiles A and L of a chunk, each as [64, 64] at level 16, the same at level 32,
    and the four blocks [16, 16] of its diagonal, for the lower levels.
    """
    return pairs_ptr, pairs_ptr + 9216


@triton.jit
def parts_of(parts_ptr, work):
    """Pointers to the diagonal of dA [64], the scale of a chunk's tiles, in 64 places, and the
    parts of beta's gradient [3, 64].
    """
    diagonal_ptr = parts_ptr + work * 320
    return diagonal_ptr, diagonal_ptr + 64, diagonal_ptr + 128


@triton.jit
def value_rows(
    do_ptr, do_t, vn_ptr, dv_ptr, count, HV: tl.constexpr, V: tl.constexpr, D: tl.constexpr
):
    """do, vn and dv [64, V] of a chunk; rows past its end are zero."""
    r = tl.arange(0, 64)[:, None]
    d = tl.arange(0, V)[None, :]
    ok = (r < count) & (d >= 0)
    do = tl.load(do_ptr + (r * do_t + d), mask=ok, other=0.0).to(D)
    vn = tl.load(vn_ptr + (r * V + d))
    dv = tl.load(dv_ptr + (r * (HV * V) + d), mask=ok, other=0.0).to(D)
    return do, vn, dv


@triton.jit
def _store_pairs(pairs_ptr, x):
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    at = pairs_ptr + i * 64 + j
    tl.store(at, tl.where((i ^ j) // 16 == 1, x, 0.0))
    tl.store(at + 4096, tl.where((i ^ j) // 32 == 1, x, 0.0))
    tl.store(pairs_ptr + 8192 + i * 16 + j % 16, x, mask=i // 16 == j // 16)


@triton.jit
def backward_tiles_kernel(
    v_ptr, do_ptr, dv_ptr, tiles_ptr, rows_ptr, pairs_ptr, parts_ptr, cu_ptr, chunk_indices_ptr,
    T, N, NC, first_row, rows,
    v_b, v_t, v_h, do_b, do_t, do_h,
    SCALE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program computes dA and dL [64, 64] of one chunk of one value head, below the diagonal;
    above it their transposes, dA and beta dL, which left rows take from right ones. Grid: (chunks *
    HV), heads fastest.

    They are in fp16, divided by a scale, the largest entry below the diagonal. `pairs`, with PAIRS
    numbers per chunk, may be the memory of `tiles`. The diagonal of dA, which has no decay, the
    scale, and `P v`, the first part of beta's gradient, go to `parts`.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p, b, first, count, row, inside = slab_rows(
        p // HV, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        return
    work = row * HV + h
    _, _, _, _, _, vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)
    _, beta_ptr, _, _ = gradient_rows_of(rows_ptr, work, K)
    diagonal_ptr, scale_ptr, by_v_ptr = parts_of(parts_ptr, work)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    dv_head = dv_ptr + ((b * T + first) * HV + h) * V
    do_head = do_ptr + b * do_b + h * do_h + first * do_t
    do, vn, dv = value_rows(do_head, do_t, vn_ptr, dv_head, count, HV, V, dtype)
    v_at = v_ptr + b * v_b + h * v_h + first * v_t
    t = tl.minimum(r, count - 1)[:, None]
    v = tl.load(v_at + (t * v_t + tl.arange(0, V)[None, :]))
    beta = tl.load(beta_ptr + r)
    tl.store(by_v_ptr + r, tl.sum(dv.to(tl.float32) * v.to(tl.float32), 1) / beta)
    vt = tl.trans(vn)
    A = tl.dot(do, vt) * SCALE
    L = tl.dot(dv, vt) * (-1.0 / beta)[:, None]
    tl.store(diagonal_ptr + r, tl.sum(tl.where(i == j, A, 0.0), 1))
    largest = tl.where(i > j, tl.maximum(tl.abs(A), tl.abs(L)), 0.0)
    # [1, 1]: Triton 3.7 fails to compile a one-axis maximum here for Blackwell
    scale = tl.maximum(tl.max(tl.max(largest, 1, keep_dims=True), 0, keep_dims=True), 1e-35)
    tl.store(scale_ptr + tl.zeros((1, 1), tl.int32), scale)
    inverse = 1.0 / scale
    A = tl.where(i > j, A * inverse, 0.0)
    L = tl.where(i > j, L * inverse, 0.0)
    A += tl.where(i < j, tl.dot(vn, tl.trans(do)) * (SCALE * inverse), 0.0)
    L += tl.where(i < j, tl.dot(vn, tl.trans(dv)) * -inverse, 0.0)
    A_ptr, L_ptr = pair_tiles_of(pairs_ptr + work * PAIRS)
    _store_pairs(A_ptr, A.to(tl.float16))
    _store_pairs(L_ptr, L.to(tl.float16))
