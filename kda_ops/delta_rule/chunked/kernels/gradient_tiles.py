"""The gradients of the 64 x 64 matrices of chunked KDA, read by `chunk_gradient_kernel`."""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import gradient_rows_of, gradient_tiles_of
from kda_ops.delta_rule.chunked.kernels.tiles import slab_rows

# Decays of 2^-96 have an inverse in bf16 and fp32, also times entries of 2^31.
REACH = tl.constexpr(96.0)


@triton.jit
def parts_of(parts_ptr, work):
    """Pointers to the diagonal of dA [64], the scale of a chunk's tiles and its level, in 64
    places, the parts of beta's gradient [5, 64], and q dq and k dk summed over K [2, 64].
    """
    diagonal_ptr = parts_ptr + work * 576
    return diagonal_ptr, diagonal_ptr + 64, diagonal_ptr + 128, diagonal_ptr + 448


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
def _level_of(marks_ptr, K: tl.constexpr):
    """How the pairs of a chunk meet, [1, 1]: 6 if decays over either half of it have an inverse, 5
    if those over its quarters have, else 0.
    """
    d = tl.arange(0, K)[None, :]
    G15 = tl.load(marks_ptr + d)
    G31 = tl.load(marks_ptr + (K + d))
    G47 = tl.load(marks_ptr + (2 * K + d))
    G63 = tl.load(marks_ptr + (3 * K + d))
    halves = tl.maximum(-G31, G31 - G63)
    first = tl.maximum(-G15, G15 - G31)
    quarters = tl.maximum(first, tl.maximum(G31 - G47, G47 - G63))
    halves = tl.max(halves, 1, keep_dims=True)
    quarters = tl.max(quarters, 1, keep_dims=True)
    return tl.where(halves <= REACH, 6, tl.where(quarters <= REACH, 5, 0))


@triton.jit
def backward_tiles_kernel(
    v_ptr, o_ptr, do_ptr, dv_ptr, tiles_ptr, rows_ptr, pairs_ptr, parts_ptr, cu_ptr,
    chunk_indices_ptr,
    T, N, NC, first_row, rows,
    v_b, v_t, v_h, do_b, do_t, do_h,
    SCALE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    NORMS: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program computes dA and dL [64, 64] of one chunk of one value head, below the diagonal.
    Grid: (chunks * HV), heads fastest.

    They are in bf16, divided by a scale, the power of two below the largest entry. At level 5 (see
    `_level_of`) pairs of rows of the two halves are in two tiles of their own, behind the others.
    `pairs`, with PAIRS numbers per chunk, may be the memory of `tiles`. The diagonal of dA, which
    has no decay, the scale, the level, and `P v`, the first part of beta's gradient, go to `parts`.
    With NORMS also the sums over K that the derivative of the norms of q and k needs: `q dq = do o`
    and `k dk = 2 P vn - dv v`, since o does not change if q is scaled and o inversely, nor if k and
    v are, and beta inversely to the square.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p, b, first, count, row, inside = slab_rows(
        p // HV, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        return
    work = row * HV + h
    vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)[5]
    _, beta_ptr, _, _, marks_ptr = gradient_rows_of(rows_ptr, work, K)
    diagonal_ptr, scale_ptr, by_v_ptr, sums_ptr = parts_of(parts_ptr, work)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    dv_head = dv_ptr + ((b * T + first) * HV + h) * V
    do_head = do_ptr + b * do_b + h * do_h + first * do_t
    t = tl.minimum(r, count - 1)[:, None]
    if o_ptr is not None:
        o_head = o_ptr + ((b * T + first) * HV + h) * V
        d = tl.arange(0, V)[None, :]
        o = tl.load(o_head + (t * (HV * V) + d)).to(tl.float32)
        by_q = tl.sum(tl.load(do_head + (t * do_t + d)).to(tl.float32) * o, 1)
        tl.store(sums_ptr + r, by_q)  # now: o would be in registers meanwhile
    do, vn, dv = value_rows(do_head, do_t, vn_ptr, dv_head, count, HV, V, dtype)
    v_at = v_ptr + b * v_b + h * v_h + first * v_t
    v = tl.load(v_at + (t * v_t + tl.arange(0, V)[None, :]))
    beta = tl.load(beta_ptr + r)
    by_v = tl.sum(dv.to(tl.float32) * v.to(tl.float32), 1)
    tl.store(by_v_ptr + r, by_v / beta)
    if NORMS:
        by_vn = tl.sum(dv.to(tl.float32) * vn.to(tl.float32), 1)
        tl.store(sums_ptr + 64 + r, 2.0 * by_vn / beta - by_v)
    vt = tl.trans(vn)
    A = tl.dot(do, vt) * SCALE
    L = tl.dot(dv, vt) * (-1.0 / beta)[:, None]
    tl.store(diagonal_ptr + r, tl.sum(tl.where(i == j, A, 0.0), 1))
    largest = tl.where(i > j, tl.maximum(tl.abs(A), tl.abs(L)), 0.0)
    # [1, 1]: Triton 3.7 fails to compile a one-axis maximum here for Blackwell
    scale = tl.maximum(tl.max(tl.max(largest, 1, keep_dims=True), 0, keep_dims=True), 1e-35)
    scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + tl.zeros((1, 1), tl.int32), scale)
    level = _level_of(marks_ptr, K)
    tl.store(scale_ptr + 1 + tl.zeros((1, 1), tl.int32), level.to(tl.float32))
    inverse = 1.0 / scale
    A = tl.where(i > j, A * inverse, 0.0)
    L = tl.where(i > j, L * inverse, 0.0)
    apart = i // 32 != j // 32
    at = pairs_ptr + work * PAIRS + (i * 64 + j)
    two = level == 5
    tl.store(at, tl.where(two & apart, 0.0, A).to(dtype))
    tl.store(at + 4096, tl.where(two & apart, 0.0, L).to(dtype))
    two = tl.broadcast_to(two, (64, 64))
    tl.store(at + 8192, tl.where(apart, A, 0.0).to(dtype), mask=two)
    tl.store(at + 12288, tl.where(apart, L, 0.0).to(dtype), mask=two)
