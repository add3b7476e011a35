"""The remaining gradients of a chunk after the scans, one independent program per chunk, value head
and 32 key columns.

With `dA = do vn^T` and `dL = -P vn^T`, P = dv / beta, the rows of dq, and of dk as a row (R) and as
a column (C) are

    dq_i = sum_j dA_ij 2^(G_i - G_j) k_j,   R_i = sum_j dL_ij 2^(G_i - G_j) k_j,   dk = beta R + C,
    C_j = sum_i 2^(G_i - G_j) (dA_ij q_i + beta_i dL_ij k_i)

over i > j, plus the terms through the states. Where decays over half of a chunk are at least 2^-96
they have an inverse in bf16, and all pairs meet in one pass: with an anchor a in the middle, rows
carry 2^(G - G_a) and columns 2^(G_a - G). Where only those over a quarter are, pairs within either
half do, and those between the halves meet in a second pass, where both factors are at most 1. In
any other chunk pairs meet at six levels, as in the forward. `backward_tiles_kernel` has chosen, and
written the tiles of dA and dL.

`dG = q dq + k (beta R - C)`, in which the two terms of a pair cancel in the sum over the chunk only
if both use the same rounded factors: so it is summed pass by pass from these. beta's gradient is `P
v + k R` summed over the row, without dividing by a possible 0.

ptxas 12.8 takes wrong descriptors for operands of warp-group GEMMs that are in registers, and for
operands of 32 columns in straight-line code (`perf/notes/backward.md`): so operands come from
memory, and loops run over the value columns. `tests/support/sass.py` looks at the result.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import (
    gradient_rows_of,
    gradient_tiles_of,
    token_gates,
)
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import parts_of
from kda_ops.delta_rule.chunked.kernels.prepare import laid_out_as
from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_slopes
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import LN2, bias_row


@triton.jit
def _matrix(matrices_ptr, which):
    r = tl.arange(0, 64)
    return tl.load(matrices_ptr + which * 4096 + r[:, None] * 64 + r[None, :])


@triton.jit
def _key_rows(x_at, norm_at, NORM: tl.constexpr, D: tl.constexpr):
    """Rows of q or k, normalized with NORM."""
    x = tl.load(x_at)
    if NORM:
        x = x.to(tl.float32) * tl.load(norm_at)[:, None]
    return x.to(D)


@triton.jit
def _decays(step, level, G, y, marks_at, matrices_ptr, K: tl.constexpr, LEVELS: tl.constexpr):
    """The exponents E of the rows of a pass, and the sign of E as those of its columns. With LEVELS
    a pass is a level; else pass 6 takes all pairs in blocks of 64 rows (level 6) or 32 (level 5),
    and pass 5 those between two blocks of 32.
    """
    if LEVELS:
        return tl.dot(_matrix(matrices_ptr, step), y), 1.0
    else:
        r = tl.arange(0, 64)[:, None]
        whole = (level == 6) | (step == 5)
        first = tl.load(marks_at + tl.where(whole, K, 0))
        second = tl.load(marks_at + tl.where(whole, K, 2 * K))
        E = G - tl.where(r < 32, first[None, :], second[None, :])
        E = tl.where(step == 5, -tl.abs(E), E)
        return E, tl.where(step == 5, 1.0, -1.0)


@triton.jit
def _tile(step, pairs_ptr, which: tl.constexpr, LEVELS: tl.constexpr):
    """The tile A (0) or L (1) of a pass."""
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    at = pairs_ptr + which * 4096 + (i * 64 + j)
    if LEVELS:
        return tl.load(at, mask=(i ^ j) >> step == 1, other=0.0)
    else:
        return tl.load(at + (6 - step) * 8192)


@triton.jit
def _later_rows(dq, R, dG, step, x, at, level, K: tl.constexpr, LEVELS: tl.constexpr):
    """Adds to dq, R and dG what the pairs of a pass give to their later row."""
    q, k, y, G, beta, scale = x
    pairs_ptr, marks_at, matrices_ptr = at
    E, sign = _decays(step, level, G, y, marks_at, matrices_ptr, K, LEVELS)
    right = (k.to(tl.float32) * tl.exp2(sign * E)).to(k.dtype)
    e = tl.exp2(E) * scale
    P = tl.dot(_tile(step, pairs_ptr, 0, LEVELS), right)
    dG += (q.to(tl.float32) * e).to(k.dtype).to(tl.float32) * P
    dq += e * P
    P = tl.dot(_tile(step, pairs_ptr, 1, LEVELS), right)
    dG += (k.to(tl.float32) * e * beta[:, None]).to(k.dtype).to(tl.float32) * P
    R += e * P
    return dq, R, dG


@triton.jit
def _earlier_rows(dk, dG, step, x, at, level, K: tl.constexpr, LEVELS: tl.constexpr):
    """Adds to dk and dG what the pairs of a pass give to their earlier row."""
    q, k, y, G, beta, scale = x
    pairs_ptr, marks_at, matrices_ptr = at
    E, sign = _decays(step, level, G, y, marks_at, matrices_ptr, K, LEVELS)
    e = tl.exp2(E)
    left = (q.to(tl.float32) * e).to(k.dtype)
    P = tl.dot(tl.trans(_tile(step, pairs_ptr, 0, LEVELS)), left)
    left = (k.to(tl.float32) * e * beta[:, None]).to(k.dtype)
    P = tl.dot(tl.trans(_tile(step, pairs_ptr, 1, LEVELS)), left, P)
    e = tl.exp2(sign * E) * scale
    dG -= (k.to(tl.float32) * e).to(k.dtype).to(tl.float32) * P
    dk += e * P
    return dk, dG


@triton.jit
def _sum_from_each(x, matrices_ptr):
    """The sums of x [64, n] from each row to the last, as GEMMs of two bf16 parts."""
    ones = _matrix(matrices_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True), 8)
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
    SLABS: tl.constexpr, PACKED: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
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
    work = row * HV + h
    diagonal_ptr, scale_ptr, by_v_ptr = parts_of(parts_ptr, work)
    level = tl.load(scale_ptr + 1).to(tl.int32)
    hk = h // (HV // H)
    _, _, _, _, _, vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)
    decay_ptr, beta_ptr, q_norm_ptr, k_norm_ptr, marks_ptr = gradient_rows_of(rows_ptr, work, K)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
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
    beta = tl.load(beta_ptr + r)
    diagonal = tl.load(diagonal_ptr + r)
    decay = tl.load(decay_ptr + k0 + a)
    scale = tl.load(scale_ptr)
    state = work * (K * V) + (k0 + a)[:, None] * V
    dq = tl.zeros((64, BK), tl.float32)
    R = tl.zeros((64, BK), tl.float32)
    for v in tl.range(0, V, BV, num_stages=STAGES):
        d = v + tl.arange(0, BV)[None, :]
        valid = (r < count)[:, None] & (d >= 0)
        S = tl.load(states_ptr + (state + d))
        do = tl.load(do_ptr + (r[:, None] * do_t + d), mask=valid, other=0.0)
        dv = tl.load(dv_ptr + (r[:, None] * (HV * V) + d), mask=valid, other=0.0)
        dq = tl.dot(do.to(dtype), tl.trans(S), dq)
        R = tl.dot(dv.to(dtype), tl.trans(S), R)
    G = tl.dot(_matrix(matrices_ptr, 6), y)
    marks_at = marks_ptr + k0 + a
    e = tl.exp2(G)
    dq *= e * SCALE
    q = _key_rows(q_ptr + k0 + (t * q_t + a[None, :]), q_norm_ptr + r, NORM, dtype)
    q = laid_out_as(q, dq.to(dtype), PACKED)
    dG = q.to(tl.float32) * dq
    R *= e * (-1.0 / beta)[:, None]
    k = _key_rows(k_ptr + k0 + (t * k_t + a[None, :]), k_norm_ptr + r, NORM, dtype)
    k = laid_out_as(k, dq.to(dtype), PACKED)
    dG += k.to(tl.float32) * (beta[:, None] * R)
    pairs_ptr += work * PAIRS
    x = (q, k, y, G, beta, scale)
    at = (pairs_ptr, marks_at, matrices_ptr)
    if level == 0:
        for step in tl.range(0, 6, num_stages=STAGES, disable_licm=True):
            dq, R, dG = _later_rows(dq, R, dG, step, x, at, level, K, True)
    else:
        for i in tl.range(level, 7, num_stages=STAGES, disable_licm=True):
            dq, R, dG = _later_rows(dq, R, dG, 6 + level - i, x, at, level, K, False)
    tl.store(by_v_ptr + (n + 1) * 64 + r, tl.sum(k.to(tl.float32) * R, 1))
    ok = (r < count)[:, None] & (a >= 0)[None, :]
    to = out + k0 + (r[:, None] * (HV * K) + a[None, :])
    dq += diagonal[:, None] * k.to(tl.float32)
    if dq_ptr is not None:
        tl.store(dq_ptr + to, dq.to(dq_ptr.dtype.element_ty), mask=ok)
    C = tl.zeros((64, BK), tl.float32)
    last = tl.zeros((BK,), tl.float32)
    for v in tl.range(0, V, BV, num_stages=STAGES):
        d = v + tl.arange(0, BV)[None, :]
        vn = tl.load(vn_ptr + (r[:, None] * V + d))
        dS = tl.load(dstates_ptr + (state + d))
        S = tl.load(states_ptr + (state + d))
        last += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        C = tl.dot(vn, tl.trans(dS), C)
    last *= decay
    if level == 0:
        E = tl.dot(_matrix(matrices_ptr, 7), y)
    else:
        E = tl.load(marks_at + 3 * K)[None, :] - G
    C *= tl.exp2(E)
    from_state = k.to(tl.float32) * C
    last += tl.sum(from_state, 0)
    dG -= from_state
    dk = beta[:, None] * R + C + diagonal[:, None] * q.to(tl.float32)
    if level == 0:
        for step in tl.range(0, 6, num_stages=STAGES, disable_licm=True):
            dk, dG = _earlier_rows(dk, dG, step, x, at, level, K, True)
    else:
        for i in tl.range(level, 7, num_stages=STAGES, disable_licm=True):
            dk, dG = _earlier_rows(dk, dG, 6 + level - i, x, at, level, K, False)
    if dk_ptr is not None:
        tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=ok)
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
