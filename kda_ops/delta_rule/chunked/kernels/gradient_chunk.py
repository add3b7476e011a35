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
if both use the same factors: so it is summed pass by pass from these. Rows are rounded to bf16;
columns, whose rounding all of dq would have, are in two bf16 parts, as good as not rounded. beta's
gradient is `P v + k R` summed over the row, without dividing by a possible 0.

Two programs of 4 warps fill the registers of a multiprocessor and wait for memory most of the time,
so all loads of a chunk are under way before the first is used, those of the scans' tiles in a loop
over the value columns. ptxas 12.8 takes wrong descriptors for operands of warp-group GEMMs that are
in registers, and for operands of 32 columns in straight-line code (`perf/notes/backward.md`): so
operands come from memory, and GEMMs are in loops, some of one round. `tests/support/sass.py` looks
at the result.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import (
    gates_of,
    gradient_rows_of,
    gradient_tiles_of,
    load_gates,
)
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import parts_of
from kda_ops.delta_rule.chunked.kernels.prepare import laid_out_as
from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_slopes
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, rounds, slab_rows
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import LN2, bias_row, rounded


@triton.jit
def _matrix(matrices_ptr, which):
    r = tl.arange(0, 64)
    return tl.load(matrices_ptr + which * 4096 + r[:, None] * 64 + r[None, :])


@triton.jit
def _sums_of(matrix, y):
    """A 0/1 matrix times y, in a loop of one round."""
    x = tl.zeros(y.shape, tl.float32)
    for _ in tl.range(0, rounds(1), num_stages=1):
        x = tl.dot(matrix, y, x)
    return x


@triton.jit
def _sum_from_each(x, matrices_ptr):
    """The sums of x [64, n] from each row to the last, as GEMMs of two bf16 parts."""
    ones = _matrix(matrices_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True), 8)
    high = x.to(tl.bfloat16)
    low = (high.to(tl.float32) - x).to(tl.bfloat16)
    return tl.dot(ones, high) - tl.dot(ones, low)


@triton.jit
def _tiles(pairs_ptr, mask):
    """The tiles A and L of a pass."""
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    at = pairs_ptr + (i * 64 + j)
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 4096, mask=mask, other=0.0)


@triton.jit
def _unit(x, norm):
    """Normalized in fp32 at each use: in bf16, only what was loaded is exact."""
    return x.to(tl.float32) * norm


@triton.jit
def _meet(
    sums, E, sign: tl.constexpr, tiles, q, k, q_norm, k_norm, beta, scale, PACKED: tl.constexpr
):  # fmt: skip
    """Adds to dq, R, dk (without beta R) and dG what the pairs of a pass give. Rows carry 2^E and
    columns 2^E with a sign, in two parts; A and L are divided by a power of two, the scale.
    """
    dq, R, dk, dG = sums
    A, L = tiles
    dtype: tl.constexpr = q.dtype
    by_column = tl.exp2(sign * E)
    column = _unit(k, k_norm) * by_column
    high = rounded(column, PACKED)
    low = (column - high).to(dtype)
    high = high.to(dtype)
    by_row = tl.exp2(E)
    q_row = rounded(_unit(q, q_norm) * by_row, PACKED)
    P = tl.dot(A, low, tl.dot(A, high)) * scale
    dq += by_row * P
    dG += q_row * P
    k_row = rounded(_unit(k, k_norm) * (by_row * beta[:, None]), PACKED)
    P = tl.dot(L, low, tl.dot(L, high)) * scale
    R += by_row * P
    dG += k_row * P
    P = tl.dot(tl.trans(A), q_row.to(dtype)) * scale
    P += tl.dot(tl.trans(L), k_row.to(dtype)) * scale
    P *= by_column
    dk += P
    dG -= _unit(k, k_norm) * P
    return dq, R, dk, dG


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
    SLABS: tl.constexpr, NORMS: tl.constexpr, PACKED: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program finishes BK key columns of one chunk of one value head.
    Grid: (chunks * HV * K / BK), columns fastest, then heads.

    It reads dv [B, T, HV, V] and writes dq and dk [B, T, HV, K], the gradient of the gate, a part
    of beta's, and with `sums` [rows, HV, 2, K] the sums over its tokens of the gradients of dt_bias
    and A_log, added to those of earlier slabs. Outputs that are None are not computed. With NORM
    and without NORMS, dq and dk are those of the normalized q and k.
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
    diagonal_ptr, scale_ptr, by_v_ptr, by_norm_ptr = parts_of(parts_ptr, work)
    level = tl.load(scale_ptr + 1).to(tl.int32)
    hk = h // (HV // H)
    vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)[5]
    decay_ptr, beta_ptr, q_norm_ptr, k_norm_ptr, marks_ptr = gradient_rows_of(rows_ptr, work, K)
    pairs_ptr += work * PAIRS
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
    d = n * BK + tl.arange(0, BK)
    t = tl.minimum(r, count - 1)[:, None]
    token = b * T + first
    do_ptr += b * do_b + h * do_h + first * do_t
    dv_ptr += (token * HV + h) * V
    q_ptr += b * q_b + hk * q_h + first * q_t
    k_ptr += b * k_b + hk * k_h + first * k_t
    gate_at = gate_ptr + b * gate_b + h * gate_h + first * gate_t + (t * gate_t + d[None, :])
    rate = gate_rate(A_log_ptr, h, HAS_A)

    gates = load_gates(gate_at, gate_t, r, GATED)
    q = tl.load(q_ptr + (t * q_t + d[None, :]))
    k = tl.load(k_ptr + (t * k_t + d[None, :]))
    everywhere = (r[:, None] >= 0) & (r[None, :] >= 0)
    whole = _tiles(pairs_ptr, everywhere)
    lower = _matrix(matrices_ptr, 6)
    bias = bias_row(bias_ptr, h * K + d, d < K, HAS_BIAS)
    beta = tl.load(beta_ptr + r)
    diagonal = tl.load(diagonal_ptr + r)[:, None]
    decay = tl.load(decay_ptr + d)
    scale = tl.load(scale_ptr)
    if NORM:
        q_norm = tl.load(q_norm_ptr + r)[:, None]
        k_norm = tl.load(k_norm_ptr + r)[:, None]
    else:
        q_norm = tl.full((64, 1), 1.0, tl.float32)
        k_norm = tl.full((64, 1), 1.0, tl.float32)

    dq = tl.zeros((64, BK), tl.float32)
    R = tl.zeros((64, BK), tl.float32)
    dk = tl.zeros((64, BK), tl.float32)
    by_decay = tl.zeros((BK, BV), tl.float32)
    by_beta = (-1.0 / beta)[:, None]
    state = work * (K * V) + d[:, None] * V
    for v in tl.range(0, V, BV, num_stages=STAGES):
        c = v + tl.arange(0, BV)[None, :]
        valid = (r < count)[:, None] & (c >= 0)
        S = tl.load(states_ptr + (state + c))
        do = tl.load(do_ptr + (r[:, None] * do_t + c), mask=valid, other=0.0)
        dv = tl.load(dv_ptr + (r[:, None] * (HV * V) + c), mask=valid, other=0.0)
        dS = tl.load(dstates_ptr + (state + c))
        vn = tl.load(vn_ptr + (r[:, None] * V + c))
        dq = tl.dot(do.to(dtype), tl.trans(S), dq)
        dk = tl.dot(vn, tl.trans(dS), dk)
        # Used within its round, so that all three are waited for: S and dS are read into registers
        # too, and Triton copies a later round over such tiles while GEMMs read them.
        R += tl.dot(dv.to(dtype), tl.trans(S)) * by_beta
        by_decay += S.to(tl.float32) * dS.to(tl.float32)
    last = tl.sum(by_decay, 1) * decay
    anchor = tl.load(marks_ptr + (tl.where(level == 5, 0, K) + d))[None, :]
    second = tl.load(marks_ptr + (tl.where(level == 5, 2 * K, K) + d))[None, :]
    G_last = tl.load(marks_ptr + (3 * K + d))[None, :]
    anchor = tl.where(r[:, None] < 32, anchor, second)
    y = gates_of(gates, r < count, rate, bias, GATED, BOUND).to(tl.float16)
    G = _sums_of(lower, y)
    q = laid_out_as(q, dq.to(q.dtype), PACKED)
    k = laid_out_as(k, dq.to(k.dtype), PACKED)
    from_anchor = G - anchor
    e = tl.exp2(G)
    dq *= e * SCALE
    dG = _unit(q, q_norm) * dq
    R *= e
    dG += _unit(k, k_norm) * (beta[:, None] * R)
    E = G_last - G
    if level == 0:
        E = _sums_of(_matrix(matrices_ptr, 7), y)
    dk *= tl.exp2(E)
    from_state = _unit(k, k_norm) * dk
    last += tl.sum(from_state, 0)
    dG -= from_state
    dq += diagonal * _unit(k, k_norm)
    dk += diagonal * _unit(q, q_norm)
    sums = (dq, R, dk, dG)
    if level == 0:
        for step in tl.range(0, 6, num_stages=1):
            E = _sums_of(_matrix(matrices_ptr, step), y)
            at_level = _tiles(pairs_ptr, (r[:, None] ^ r[None, :]) >> step == 1)
            for _ in tl.range(0, rounds(1), num_stages=1):
                sums = _meet(sums, E, 1.0, at_level, q, k, q_norm, k_norm, beta, scale, PACKED)
    else:
        for _ in tl.range(0, rounds(1), num_stages=1):
            sums = _meet(sums, from_anchor, -1.0, whole, q, k, q_norm, k_norm, beta, scale, PACKED)
        if level == 5:
            between = _tiles(pairs_ptr + 8192, everywhere)
            # loaded again: the anchor would be in registers meanwhile
            below = tl.load(marks_ptr + d)[None, :]
            middle = tl.load(marks_ptr + (K + d))[None, :]
            above = tl.load(marks_ptr + (2 * K + d))[None, :]
            to_middle = tl.where(r[:, None] < 32, below - middle, above - middle)
            for _ in tl.range(0, rounds(1), num_stages=1):
                E = -tl.abs(from_anchor + to_middle)
                sums = _meet(sums, E, 1.0, between, q, k, q_norm, k_norm, beta, scale, PACKED)
    dq, R, dk, dG = sums
    if NORMS:
        by_q = tl.load(by_norm_ptr + r)[:, None]
        by_k = tl.load(by_norm_ptr + 64 + r)[:, None]
    out = (token * HV + h) * K + (r[:, None] * (HV * K) + d[None, :])
    ok = (r < count)[:, None] & (d >= 0)[None, :]
    tl.store(by_v_ptr + (n + 1) * 64 + r, tl.sum(_unit(k, k_norm) * R, 1))
    dk += beta[:, None] * R
    if NORMS:
        dq = q_norm * (dq - _unit(q, q_norm) * by_q)
        dk = k_norm * (dk - _unit(k, k_norm) * by_k)
    if dq_ptr is not None:
        tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=ok)
    if dk_ptr is not None:
        tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=ok)
    if dgate_ptr is not None or sums_ptr is not None:
        dG = tl.where(ok, dG, 0.0)
        dG += tl.where((r == count - 1)[:, None], last[None, :], 0.0)
        if GATED:
            dG = _sum_from_each(dG, matrices_ptr)
            x = tl.load(gate_at)
            x = laid_out_as(x, dG.to(x.dtype), PACKED)
            bias = bias_row(bias_ptr, h * K + d, d < K, HAS_BIAS)
            by_x, by_rate = gate_slopes(x, rate, bias, BOUND)
            if dgate_ptr is not None:
                to = dgate_ptr + out
                tl.store(to, (dG * by_x).to(dgate_ptr.dtype.element_ty), mask=ok)
            if sums_ptr is not None:
                sums_at = sums_ptr + work * (2 * K) + d
                by_bias = tl.sum(tl.where(ok, dG * by_x, 0.0), 0)
                by_rate = tl.sum(tl.where(ok, dG * by_rate, 0.0), 0)
                if SLABS:
                    by_bias += tl.load(sums_at)
                    by_rate += tl.load(sums_at + K)
                tl.store(sums_at, by_bias)
                tl.store(sums_at + K, by_rate)
        else:
            tl.store(dgate_ptr + out, dG * LN2, mask=ok)
