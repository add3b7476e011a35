"""The remaining gradients of a chunk after the scans, one independent program per chunk, value head
and 64 key columns.

With `dA = do vn^T` and `dL = -P vn^T`, P = dv / beta, the rows of dq, and of dk as a row (R) and as
a column (C) are

    dq_i = sum_j dA_ij 2^(G_i - G_j) k_j,   R_i = sum_j dL_ij 2^(G_i - G_j) k_j,   dk = beta R + C,
    C_j = sum_i 2^(G_i - G_j) (dA_ij q_i + beta_i dL_ij k_i)

over i > j, plus the terms through the states. As in the forward, pairs of rows meet at six levels,
and one tile 2^-|G - G_a| per level serves both sides. Left rows need right ones and right rows left
ones, so a level is two GEMMs, `A (q right, k left)` and `L k`, with the tiles of
`backward_tiles_kernel`.

Then `dG = q dq + k (beta R - C)`, in which the two terms of a pair cancel in the sum over the chunk
only if both use the same rounded factors: hence fp16 factors, with one scale per tile of A and L.
beta's gradient is `P v + k R` summed over the row, without dividing by a possible 0.

Operands of warp-group GEMMs come from memory, never from registers: with the latter ptxas 12.8
confuses descriptors in some variants of this kernel, and the result is wrong.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import (
    gradient_rows_of,
    gradient_tiles_of,
    token_gates,
)
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import (
    pair_tiles_of,
    parts_of,
    value_rows,
)
from kda_ops.delta_rule.chunked.kernels.prepare import half, laid_out_as, multiply, rows_between
from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_slopes
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import LN2, bias_row


@triton.jit
def _matrix(matrices_ptr, which):
    r = tl.arange(0, 64)
    return tl.load(matrices_ptr + which * 4096 + r[:, None] * 64 + r[None, :])


@triton.jit
def _masked(x, mask, PACKED: tl.constexpr):
    """X [.., n, n] in 16 bits where the mask is -1, else 0; two per instruction."""
    if PACKED:
        mask = tl.broadcast_to(mask, x.shape)
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where(mask != 0, x, 0.0)


@triton.jit
def _either(mask, a, b, PACKED: tl.constexpr):
    """A where the mask is -1, else b; two per instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [tl.broadcast_to(mask, a.shape), a, b],
            dtype=a.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.where(mask != 0, a, b)


@triton.jit
def _key_rows(x_at, norm_at, NORM: tl.constexpr):
    """Rows of q or k, normalized with NORM, in fp16."""
    x = tl.load(x_at)
    if NORM:
        x = x.to(tl.float32) * tl.load(norm_at)[:, None]
    return x.to(tl.float16)


@triton.jit
def _level(dq, C, R, e, q, k, A, L, right, scale, PACKED: tl.constexpr):
    """Adds one level, in tiles [64, K] or [4, 16, K]; `right`: the rows right of the anchor."""
    e = e.to(tl.float16)
    ke = multiply(k, e, PACKED)
    side = tl.where(right, -1, 0).to(tl.int16)
    P = tl.dot(A, _either(side, multiply(q, e, PACKED), ke, PACKED))
    # separate accumulators, in a sum that Triton does not merge: for chained GEMMs it puts all
    # warps along the rows
    t = tl.dot(L, ke) - tl.where(right, 0.0, -1.0) * P
    e = e.to(tl.float32) * scale
    from_left = e * tl.where(right, 1.0, 0.0)
    dq += from_left * P
    R += from_left * t
    C += (e - from_left) * t
    return dq, C, R


@triton.jit
def _levels(dq, C, R, q, k, y, pairs_ptr, scale, matrices_ptr, PACKED: tl.constexpr):
    """All six levels. Loops, because their edges keep the compiler from interleaving levels."""
    BK: tl.constexpr = k.shape[1]
    r = tl.arange(0, 64)
    A_ptr, L_ptr = pair_tiles_of(pairs_ptr)
    for level in tl.range(4, 6, num_stages=1, disable_licm=True):
        at = (level - 4) * 4096 + (r[:, None] * 64 + r[None, :])
        e = tl.exp2(tl.dot(_matrix(matrices_ptr, level - 2), y))
        A = tl.load(A_ptr + at)
        L = tl.load(L_ptr + at)
        right = ((r >> level) % 2 == 1)[:, None]
        dq, C, R = _level(dq, C, R, e, q, k, A, L, right, scale, PACKED)
    q = tl.reshape(q, (4, 16, BK))
    k = tl.reshape(k, (4, 16, BK))
    y = tl.reshape(y, (4, 16, BK))
    dq = tl.reshape(dq, (4, 16, BK))
    C = tl.reshape(C, (4, 16, BK))
    R = tl.reshape(R, (4, 16, BK))
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    at = 8192 + (tl.arange(0, 4)[:, None, None] * 256 + (i * 16 + j)[None, :, :])
    A = tl.load(A_ptr + at)
    L = tl.load(L_ptr + at)
    for level in tl.range(0, 4, num_stages=1, disable_licm=True):
        s = 1 << level
        between = tl.broadcast_to(rows_between(i, j, s)[None, :, :], (4, 16, 16))
        e = tl.exp2(tl.dot(half(between), y))
        meet = tl.where((i ^ j) // s == 1, -1, 0).to(tl.int16)[None, :, :]
        right = ((i // s) % 2 == 1)[None, :, :]
        A_level = _masked(A, meet, PACKED)
        L_level = _masked(L, meet, PACKED)
        dq, C, R = _level(dq, C, R, e, q, k, A_level, L_level, right, scale, PACKED)
    return tl.reshape(dq, (64, BK)), tl.reshape(C, (64, BK)), tl.reshape(R, (64, BK))


@triton.jit
def _sum_from_each(x, matrices_ptr):
    """The sums of x [64, n] from each row to the last, as GEMMs of two bf16 parts."""
    ones = _matrix(matrices_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True), 4)
    high = x.to(tl.bfloat16)
    low = (high.to(tl.float32) - x).to(tl.bfloat16)
    return tl.dot(ones, high) - tl.dot(ones, low)


@triton.jit
def chunk_gradient_kernel(
    q_ptr, k_ptr, gate_ptr, A_log_ptr, bias_ptr, do_ptr, dv_ptr, tiles_ptr, rows_ptr, states_ptr,
    dstates_ptr, pairs_ptr, parts_ptr, matrices_ptr, dq_ptr, dk_ptr, dgate_ptr, sums_ptr, cu_ptr,
    chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    SCALE: tl.constexpr, GATED: tl.constexpr, BOUND: tl.constexpr, NORM: tl.constexpr,
    HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, VARLEN: tl.constexpr,
    SLABS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program finishes BK key columns of one chunk of one value head.
    Grid: (chunks * HV * K / BK), columns fastest, then heads.

    It reads dv [B, T, HV, V] and writes dq and dk [B, T, HV, K], the gradient of the gate, a part
    of beta's, and with `sums` [rows, HV, 2, K] the sums over its tokens of the gradients of dt_bias
    and A_log, added to those of earlier slabs. Outputs that are None are not computed. With NORM,
    dq and dk are those of the normalized q and k.
    """
    p = tl.program_id(0).to(tl.int64)
    n = (p % (K // BK)).to(tl.int32)
    p = p // (K // BK)
    h = p % HV
    p, b, first, count, row, inside = slab_rows(
        p // HV, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0 and n == 0:
            clear_padding(dv_ptr, cu_ptr, p, h, T, N, NC, HV, V, V)
            if dq_ptr is not None:
                clear_padding(dq_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
            if dk_ptr is not None:
                clear_padding(dk_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
            if dgate_ptr is not None:
                clear_padding(dgate_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
        return
    hk = h // (HV // H)
    work = row * HV + h
    _, _, _, _, _, vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)
    decay_ptr, beta_ptr, q_norm_ptr, k_norm_ptr = gradient_rows_of(rows_ptr, work, K)
    diagonal_ptr, scale_ptr, by_v_ptr = parts_of(parts_ptr, work)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
    d = tl.arange(0, V)[None, :]
    a = tl.arange(0, BK)
    k0 = n * BK
    t = tl.minimum(r, count - 1)[:, None]
    token = b * T + first
    do_ptr += b * do_b + h * do_h + first * do_t
    dv_ptr += (token * HV + h) * V
    q_ptr += b * q_b + hk * q_h + first * q_t
    k_ptr += b * k_b + hk * k_h + first * k_t
    gate_ptr += b * gate_b + h * gate_h + first * gate_t
    out = (token * HV + h) * K
    rate = gate_rate(A_log_ptr, h, HAS_A)

    bias = bias_row(bias_ptr, h * K + k0 + a, a < BK, HAS_BIAS)
    gate_at = gate_ptr + k0 + (t * gate_t + a[None, :])
    y = token_gates(gate_at, gate_t, r, r < count, rate, bias, GATED, BOUND).to(tl.float16)
    do, vn, dv = value_rows(do_ptr, do_t, vn_ptr, dv_ptr, count, HV, V, dtype)
    state = (k0 + a)[:, None] * V + d
    S = tl.load(states_ptr + work * (K * V) + state)
    dS = tl.load(dstates_ptr + work * (K * V) + state)
    decay = tl.load(decay_ptr + k0 + a)
    last = decay * tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    C = tl.dot(vn, tl.trans(dS)) * tl.exp2(tl.dot(_matrix(matrices_ptr, 1), y))
    e = tl.exp2(tl.dot(_matrix(matrices_ptr, 0), y))
    beta = tl.load(beta_ptr + r)
    R = tl.dot(dv, tl.trans(S)) * (e * (-1.0 / beta)[:, None])
    dq = tl.dot(do, tl.trans(S)) * (e * SCALE)
    q = _key_rows(q_ptr + k0 + (t * q_t + a[None, :]), q_norm_ptr + r, NORM)
    k = _key_rows(k_ptr + k0 + (t * k_t + a[None, :]), k_norm_ptr + r, NORM)
    last += tl.sum(k.to(tl.float32) * C, 0)
    q = laid_out_as(q, dq.to(tl.float16), PACKED)
    k = laid_out_as(k, dq.to(tl.float16), PACKED)
    scale = tl.load(scale_ptr)
    dq, C, R = _levels(dq, C, R, q, k, y, pairs_ptr + work * PAIRS, scale, matrices_ptr, PACKED)
    # reload what was loaded before the levels, and store results early, to save registers
    q = _key_rows(q_ptr + k0 + (t * q_t + a[None, :]), q_norm_ptr + r, NORM)
    q = q.to(tl.float32)
    dG = q * dq
    k = _key_rows(k_ptr + k0 + (t * k_t + a[None, :]), k_norm_ptr + r, NORM)
    k = k.to(tl.float32)
    ok = (r < count)[:, None] & (a >= 0)[None, :]
    to = out + k0 + ((r)[:, None] * (HV * K) + a[None, :])
    diagonal = tl.load(diagonal_ptr + r)
    dq += diagonal[:, None] * k
    if dq_ptr is not None:
        tl.store(dq_ptr + to, dq.to(dq_ptr.dtype.element_ty), mask=ok)
    tl.store(by_v_ptr + (n + 1) * 64 + r, tl.sum(k * R, 1))
    R = R * beta[:, None]
    dG += k * (R - C)
    C += R + diagonal[:, None] * q
    if dk_ptr is not None:
        tl.store(dk_ptr + to, C.to(dk_ptr.dtype.element_ty), mask=ok)
    if dgate_ptr is not None or sums_ptr is not None:
        dG = tl.where(ok, dG, 0.0)
        dG += tl.where((r == count - 1)[:, None], last[None, :], 0.0)
        if GATED:
            dG = _sum_from_each(dG, matrices_ptr)
            x = tl.load(gate_ptr + k0 + (t * gate_t + a[None, :]))
            bias = bias_row(bias_ptr, h * K + k0 + a, a < BK, HAS_BIAS)
            by_x, by_rate = gate_slopes(x, rate, bias, BOUND)
            if dgate_ptr is not None:
                tl.store(dgate_ptr + to, (dG * by_x).to(dgate_ptr.dtype.element_ty), mask=ok)
            if sums_ptr is not None:
                sums_at = sums_ptr + work * (2 * K) + k0 + a
                by_bias = tl.sum(tl.where(ok, dG * by_x, 0.0), 0)
                by_rate = tl.sum(tl.where(ok, dG * by_rate, 0.0), 0)
                if SLABS:
                    by_bias += tl.load(sums_at)
                    by_rate += tl.load(sums_at + K)
                tl.store(sums_at, by_bias)
                tl.store(sums_at + K, by_rate)
        else:
            tl.store(dgate_ptr + to, dG * LN2, mask=ok)
