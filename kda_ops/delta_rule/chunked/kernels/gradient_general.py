"""The gradient of chunked KDA for any K, V and dtype: the formulas of `gradient_chunk` in blocks of
columns, with the workspace in fp32 and all GEMMs in full fp32.

One file, since its five kernels and `gradient_scan` are one computation on one workspace.

Takes normalized q and k, the cumulative gate in log2 and beta after its sigmoid. GEMMs in full fp32
run on FMA units, so states and rows are kept in memory, with a barrier before and after each read
of what the program itself wrote.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_slopes
from kda_ops.delta_rule.chunked.kernels.tiles import (
    chunk_rows,
    clear_padding,
    full_dot,
    meets,
    sequence_part,
    slab_rows,
)
from kda_ops.delta_rule.kernel import rounded_product
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import LN2, bias_row


@triton.jit
def _tiles(tiles_ptr, work, KP: tl.constexpr, VP: tl.constexpr):
    """Pointers to w, kg, qg [64, KP], Aqk, T [64, 64], u, then vn, and P [64, VP] of a chunk."""
    w_ptr = tiles_ptr + work * (64 * (3 * KP + 2 * VP + 128))
    A_ptr = w_ptr + 192 * KP
    u_ptr = A_ptr + 8192
    return w_ptr, w_ptr + 64 * KP, w_ptr + 128 * KP, A_ptr, A_ptr + 4096, u_ptr, u_ptr + 64 * VP


@triton.jit
def _rows(x_ptr, x_t, count, cols, width):
    """A tile [64, cols] in fp32, zero past the chunk's rows and the tensor's width."""
    r = tl.arange(0, 64)[:, None]
    at = x_ptr + r * x_t + cols[None, :]
    return tl.load(at, mask=(r < count) & (cols < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _decays(G, G_ptr, G_t, count, cols, s, K: tl.constexpr):
    """2^-|G - G_a| of level s."""
    r = tl.arange(0, 64)
    a = tl.minimum((r // (2 * s)) * (2 * s) + s - 1, count - 1)
    at = G_ptr + a[:, None] * G_t + cols[None, :]
    return tl.exp2(-tl.abs(G - tl.load(at, mask=(cols < K)[None, :], other=0.0)))


@triton.jit
def _gates(G_ptr, G_t, count, cols, K: tl.constexpr):
    """G of a chunk's rows, and the last one; rows past its end repeat it, so that exponents stay
    <= 0.
    """
    r = tl.minimum(tl.arange(0, 64), count - 1)[:, None]
    G = tl.load(G_ptr + r * G_t + cols[None, :], mask=(cols < K)[None, :], other=0.0)
    return G, tl.load(G_ptr + (count - 1) * G_t + cols, mask=cols < K, other=0.0)


@triton.jit
def general_prepare_kernel(
    q_ptr, k_ptr, v_ptr, G_ptr, beta_ptr, tiles_ptr, decay_ptr,
    cu_ptr, chunk_indices_ptr, T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, G_b, G_t, G_h, beta_b, beta_t, beta_h,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
):  # fmt: skip
    """One program prepares one chunk of one value head for the scans. Grid: (chunks, HV)."""
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    _, b, first, count, row, inside = slab_rows(
        p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        return
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    q_ptr += b * q_b + hk * q_h + first * q_t
    k_ptr += b * k_b + hk * k_h + first * k_t
    v_ptr += b * v_b + h * v_h + first * v_t
    G_ptr += b * G_b + h * G_h + first * G_t
    beta_ptr += b * beta_b + h * beta_h + first * beta_t
    beta = tl.load(beta_ptr + r * beta_t, mask=r < count, other=0.0).to(tl.float32)
    w_ptr, kg_ptr, qg_ptr, A_ptr, T_ptr, u_ptr, _P_ptr = _tiles(tiles_ptr, row * HV + h, KP, VP)
    A = tl.zeros((64, 64), tl.float32)
    M = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, K, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        q = _rows(q_ptr, q_t, count, cols, K)
        k = _rows(k_ptr, k_t, count, cols, K)
        G, _last = _gates(G_ptr, G_t, count, cols, K)
        A += tl.where(i == j, full_dot(q, tl.trans(k)), 0.0)
        for level in range(6):
            e = _decays(G, G_ptr, G_t, count, cols, 1 << level, K)
            meet = meets(i, j, 1 << level)
            A += tl.where(meet, full_dot(q * e, tl.trans(k * e)), 0.0)
            M += tl.where(meet, full_dot(k * e, tl.trans(k * e)), 0.0)
    M = M * beta[:, None]
    X = tl.where(i == j, 1.0, 0.0)
    for level in range(6):
        X -= full_dot(X, full_dot(tl.where(meets(i, j, 1 << level), M, 0.0), X))
    tl.store(A_ptr + i * 64 + j, A * SCALE)
    tl.store(T_ptr + i * 64 + j, X)
    X = X * beta[None, :]
    for k0 in range(0, KP, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        q = _rows(q_ptr, q_t, count, cols, K)
        k = _rows(k_ptr, k_t, count, cols, K)
        G, last = _gates(G_ptr, G_t, count, cols, K)
        tl.store(decay_ptr + (row * HV + h) * KP + cols, tl.exp2(last))
        at = i * KP + cols[None, :]
        e = tl.exp2(G)
        tl.store(kg_ptr + at, k * tl.exp2(last[None, :] - G))
        tl.store(qg_ptr + at, q * e * SCALE)
        tl.store(w_ptr + at, full_dot(X, k * e))
    for v0 in range(0, VP, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        tl.store(u_ptr + i * VP + cols[None, :], full_dot(X, _rows(v_ptr, v_t, count, cols, V)))


@triton.jit
def general_forward_kernel(
    tiles_ptr, decay_ptr, states_ptr, initial_ptr, before_ptr, after_ptr,
    cu_ptr, T, N, first_row, rows, initial_n, initial_h, initial_v, initial_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program carries BLOCK columns of one head's state through one sequence, and writes the
    state before every chunk, and vn over u. Grid: (VP / BLOCK * (sequence, head) pairs).
    """
    BLOCKS: tl.constexpr = VP // BLOCK
    p = tl.program_id(0).to(tl.int64)
    if p // BLOCKS >= N * HV:
        return
    n = p // BLOCKS // HV
    h = p // BLOCKS % HV
    _, _, _, row, lo, hi, begins, ends = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if hi <= lo:
        return
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    v = (p % BLOCKS).to(tl.int32) * BLOCK + d
    block = d[:, None] * VP + v[None, :]
    S_ptr = states_ptr + ((row + lo) * HV + h) * (2 * KP * VP)
    for k0 in range(0, KP, BLOCK):
        S = tl.zeros((BLOCK, BLOCK), tl.float32)
        if initial_ptr is not None:
            keys = (k0 + d)[:, None]
            at = n * initial_n + h * initial_h + keys * initial_k + v[None, :] * initial_v
            read = (keys < K) & (v < V)[None, :] & begins
            S = tl.load(initial_ptr + at, mask=read, other=0.0).to(tl.float32)
        if SLABS and begins == 0:
            S = tl.load(before_ptr + (h * KP + k0) * VP + block)
        tl.store(S_ptr + k0 * VP + block, S)
    for c in range(lo, hi):
        work = (row + c) * HV + h
        w_ptr, kg_ptr, _qg_ptr, _A_ptr, _T_ptr, u_ptr, _P_ptr = _tiles(tiles_ptr, work, KP, VP)
        S_ptr = states_ptr + work * (2 * KP * VP)
        tl.debug_barrier()
        u_at = u_ptr + r[:, None] * VP + v[None, :]
        vn = tl.load(u_at)
        for k0 in range(0, KP, BLOCK):
            w = tl.load(w_ptr + r[:, None] * KP + (k0 + d)[None, :])
            vn -= full_dot(w, tl.load(S_ptr + k0 * VP + block))
        tl.store(u_at, vn)
        for k0 in range(0, KP, BLOCK):
            S = tl.load(S_ptr + k0 * VP + block)
            S *= tl.load(decay_ptr + work * KP + k0 + d)[:, None]
            kg = tl.load(kg_ptr + r[:, None] * KP + (k0 + d)[None, :])
            S += full_dot(tl.trans(kg), vn)
            if c + 1 < hi:
                tl.store(S_ptr + HV * (2 * KP * VP) + k0 * VP + block, S)
            elif SLABS:
                tl.store(
                    after_ptr + (h * KP + k0) * VP + block, S, mask=(d >= 0)[:, None] & (not ends)
                )


@triton.jit
def general_backward_kernel(
    tiles_ptr, decay_ptr, states_ptr, do_ptr, beta_ptr, dv_ptr, dfinal_ptr, dinitial_ptr,
    before_ptr, after_ptr, cu_ptr, T, N, first_row, rows,
    do_b, do_t, do_h, beta_b, beta_t, beta_h, dfinal_n, dfinal_h, dfinal_v, dfinal_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program carries BLOCK columns of the gradient of one head's state back through one
    sequence, and writes it after every chunk, P, the gradients of v and of the initial state. Grid:
    (VP / BLOCK * (sequence, head) pairs).
    """
    BLOCKS: tl.constexpr = VP // BLOCK
    p = tl.program_id(0).to(tl.int64)
    if p // BLOCKS >= N * HV:
        return
    n = p // BLOCKS // HV
    h = p // BLOCKS % HV
    b, start, end, row, lo, hi, begins, ends = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    length = (end - start).to(tl.int32)
    if hi < lo:
        return
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    v = (p % BLOCKS).to(tl.int32) * BLOCK + d
    block = d[:, None] * VP + v[None, :]
    initial = (n * HV + h) * (V * K) + d[:, None] + v[None, :] * K
    for k0 in range(0, KP, BLOCK):
        keys = (k0 + d)[:, None]
        inside = (keys < K) & (v < V)[None, :]
        dS = tl.zeros((BLOCK, BLOCK), tl.float32)
        if dfinal_ptr is not None:
            at = n * dfinal_n + h * dfinal_h + keys * dfinal_k + v[None, :] * dfinal_v
            dS = tl.load(dfinal_ptr + at, mask=inside & ends, other=0.0).to(tl.float32)
        if SLABS and not ends:
            dS = tl.load(after_ptr + (h * KP + k0) * VP + block)
        if hi > lo:
            last = states_ptr + ((row + hi - 1) * HV + h) * (2 * KP * VP) + KP * VP
            tl.store(last + k0 * VP + block, dS)
        elif dinitial_ptr is not None:
            tl.store(dinitial_ptr + initial + k0, dS.to(dinitial_ptr.dtype.element_ty), mask=inside)
    for back in range(0, hi - lo):
        c = hi - 1 - back
        work = (row + c) * HV + h
        w_ptr, kg_ptr, qg_ptr, A_ptr, T_ptr, _u_ptr, P_ptr = _tiles(tiles_ptr, work, KP, VP)
        dS_ptr = states_ptr + work * (2 * KP * VP) + KP * VP
        token = start + c * 64
        ok = (r < length - c * 64)[:, None] & (v < V)[None, :]
        do_at = do_ptr + b * do_b + h * do_h + token * do_t + r[:, None] * do_t + v[None, :]
        do = tl.load(do_at, mask=ok, other=0.0).to(tl.float32)
        tl.debug_barrier()
        square = r[:, None] * 64 + r[None, :]
        dvn = full_dot(tl.trans(tl.load(A_ptr + square)), do)
        for k0 in range(0, KP, BLOCK):
            kg = tl.load(kg_ptr + r[:, None] * KP + (k0 + d)[None, :])
            dvn += full_dot(kg, tl.load(dS_ptr + k0 * VP + block))
        P = tl.where(ok, full_dot(tl.trans(tl.load(T_ptr + square)), dvn), 0.0)
        tl.store(P_ptr + r[:, None] * VP + v[None, :], P)
        beta_at = beta_ptr + b * beta_b + h * beta_h + (token + r) * beta_t
        beta = tl.load(beta_at, mask=r < length - c * 64, other=0.0).to(tl.float32)
        dv_at = dv_ptr + ((b * T + token + r)[:, None] * HV + h) * V + v[None, :]
        tl.store(dv_at, (P * beta[:, None]).to(dv_ptr.dtype.element_ty), mask=ok)
        for k0 in range(0, KP, BLOCK):
            wide = r[:, None] * KP + (k0 + d)[None, :]
            dS = tl.load(dS_ptr + k0 * VP + block)
            dS *= tl.load(decay_ptr + work * KP + k0 + d)[:, None]
            dS += full_dot(tl.trans(tl.load(qg_ptr + wide)), do)
            dS -= full_dot(tl.trans(tl.load(w_ptr + wide)), dvn)
            if c > lo:
                tl.store(dS_ptr - HV * (2 * KP * VP) + k0 * VP + block, dS)
            else:
                if SLABS:
                    carried = (d >= 0)[:, None] & (begins == 0)
                    tl.store(before_ptr + (h * KP + k0) * VP + block, dS, mask=carried)
                if dinitial_ptr is not None:
                    inside = (k0 + d < K)[:, None] & (v < V)[None, :] & begins
                    to = dinitial_ptr + initial + k0
                    tl.store(to, dS.to(dinitial_ptr.dtype.element_ty), mask=inside)


@triton.jit
def general_chunk_kernel(
    q_ptr, k_ptr, v_ptr, G_ptr, beta_ptr, do_ptr, tiles_ptr, states_ptr,
    dq_ptr, dk_ptr, dv_ptr, dG_ptr, dbeta_ptr, cu_ptr, chunk_indices_ptr, T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, G_b, G_t, G_h, beta_b, beta_t, beta_h,
    do_b, do_t, do_h,
    SCALE: tl.constexpr, GATED: tl.constexpr, BETA_SCALE: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program finishes one chunk of one value head: dq, dk [B, T, HV, K] and the gradient of G
    [B, T, HV, K] in fp32, and beta's. Grid: (chunks, HV). With GATED they are those of the tokens'
    gates in nats, and of beta before its sigmoid.
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    p, b, first, count, row, inside = slab_rows(
        p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(dv_ptr, cu_ptr, p, h, T, N, NC, HV, V, VP)
            clear_padding(dG_ptr, cu_ptr, p, h, T, N, NC, HV, K, KP)
            clear_padding(dbeta_ptr, cu_ptr, p, h, T, N, NC, HV, 1, 1)
        return
    hk = h // (HV // H)
    work = row * HV + h
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    d = tl.arange(0, BLOCK)
    q_ptr += b * q_b + hk * q_h + first * q_t
    k_ptr += b * k_b + hk * k_h + first * k_t
    v_ptr += b * v_b + h * v_h + first * v_t
    G_ptr += b * G_b + h * G_h + first * G_t
    do_ptr += b * do_b + h * do_h + first * do_t
    beta_ptr += b * beta_b + h * beta_h + first * beta_t
    beta = tl.load(beta_ptr + r * beta_t, mask=r < count, other=0.0).to(tl.float32)
    _, _, _, _, _, vn_ptr, P_ptr = _tiles(tiles_ptr, work, KP, VP)
    states_ptr += work * (2 * KP * VP)
    A = tl.zeros((64, 64), tl.float32)
    L = tl.zeros((64, 64), tl.float32)
    dbeta = tl.zeros((64,), tl.float32)
    for v0 in range(0, VP, BLOCK):
        do = _rows(do_ptr, do_t, count, v0 + d, V)
        vn = tl.load(vn_ptr + i * VP + (v0 + d)[None, :])
        P = tl.load(P_ptr + i * VP + (v0 + d)[None, :])
        dbeta += tl.sum(P * _rows(v_ptr, v_t, count, v0 + d, V), 1)
        lower = full_dot(do, tl.trans(vn))
        A += tl.where(i >= j, lower, full_dot(vn, tl.trans(do)))
        L -= tl.where(i > j, full_dot(P, tl.trans(vn)), full_dot(vn, tl.trans(P)) * beta[None, :])
    A *= SCALE
    diagonal = tl.sum(tl.where(i == j, A, 0.0), 1)[:, None]
    for k0 in range(0, KP, BLOCK):
        cols = k0 + d
        q = _rows(q_ptr, q_t, count, cols, K)
        k = _rows(k_ptr, k_t, count, cols, K)
        G, end = _gates(G_ptr, G_t, count, cols, K)
        dq = tl.zeros((64, BLOCK), tl.float32)
        C = tl.zeros((64, BLOCK), tl.float32)
        through = tl.zeros((64, BLOCK), tl.float32)  # the part of C through the state
        R = tl.zeros((64, BLOCK), tl.float32)
        last = tl.zeros((BLOCK,), tl.float32)
        for v0 in range(0, VP, BLOCK):
            do = _rows(do_ptr, do_t, count, v0 + d, V)
            vn = tl.load(vn_ptr + i * VP + (v0 + d)[None, :])
            P = tl.load(P_ptr + i * VP + (v0 + d)[None, :])
            at = states_ptr + cols[:, None] * VP + (v0 + d)[None, :]
            S = tl.load(at)
            dS = tl.load(at + KP * VP)
            dq += full_dot(do, tl.trans(S))
            R -= full_dot(P, tl.trans(S))
            through += full_dot(vn, tl.trans(dS))
            last += tl.sum(S * dS, 1)
        e = tl.exp2(G)
        dq *= e * SCALE
        R *= e
        through *= tl.exp2(end[None, :] - G)
        last *= tl.exp2(end)
        for level in range(6):
            s = 1 << level
            e = _decays(G, G_ptr, G_t, count, cols, s, K)
            right = ((r // s) % 2 == 1)[:, None]
            meet = (i ^ j) // s == 1
            P = full_dot(tl.where(meet, A, 0.0), tl.where(right, q, k) * e)
            t = full_dot(tl.where(meet, L, 0.0), k * e)
            dq += tl.where(right, e * P, 0.0)
            R += tl.where(right, e * t, 0.0)
            C += tl.where(right, 0.0, e * (t + P))
        dbeta += tl.sum(k * R, 1)
        R *= beta[:, None]
        dG = q * dq + k * (R - C)
        if GATED:  # sum the few remaining terms, not many that cancel
            given = rounded_product(k, through)
            before = tl.cumsum(given, axis=0) - given
            dG = tl.cumsum(dG, axis=0, reverse=True) + before + last[None, :]
        else:
            last += tl.sum(k * through, 0)
            dG += tl.where((r == count - 1)[:, None], last[None, :], 0.0) - k * through
            dG *= LN2
        ok = (r < count)[:, None] & (cols < K)[None, :]
        to = ((b * T + first + r)[:, None] * HV + h) * K + cols[None, :]
        tl.store(dG_ptr + to, dG, mask=ok)
        tl.store(dq_ptr + to, dq + diagonal * k, mask=ok)
        tl.store(dk_ptr + to, C + through + R + diagonal * q, mask=ok)
    if GATED:
        dbeta *= beta * (1.0 - beta * (1.0 / BETA_SCALE))
    at = dbeta_ptr + (b * T + first + r) * HV + h
    tl.store(at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=r < count)


@triton.jit
def general_gate_kernel(
    x_ptr, A_log_ptr, bias_ptr, dG_ptr, dx_ptr, sums_ptr, cu_ptr, chunk_indices_ptr, T, N, NC,
    x_b, x_t, x_h, BOUND: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """One program computes, from the gradient of the gates in nats [B, T, HV, K] of one chunk of
    one value head, those of x and, summed over its tokens in `sums` [rows, HV, 2, K], of dt_bias
    and A_log. Grid: (chunks, HV).
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b, first, count, row = chunk_rows(p, chunk_indices_ptr, cu_ptr, T, N, NC, VARLEN)
    if count == 0:
        if VARLEN:
            clear_padding(dx_ptr, cu_ptr, p, h, T, N, NC, HV, K, KP)
        return
    x_ptr += b * x_b + h * x_h + first * x_t
    rate = gate_rate(A_log_ptr, h, HAS_A)
    r = tl.arange(0, 64)
    for k0 in range(0, KP, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        to = ((b * T + first + r)[:, None] * HV + h) * K + cols[None, :]
        ok = (r < count)[:, None] & (cols < K)[None, :]
        g = tl.load(dG_ptr + to, mask=ok, other=0.0)
        x = _rows(x_ptr, x_t, count, cols, K)
        by_x, by_rate = gate_slopes(
            x, rate, bias_row(bias_ptr, h * K + cols, cols < K, HAS_BIAS), BOUND
        )
        by_x = tl.where(ok, g * by_x, 0.0)
        tl.store(dx_ptr + to, by_x.to(dx_ptr.dtype.element_ty), mask=ok)
        if sums_ptr is not None:
            at = sums_ptr + (row * HV + h) * (2 * K) + cols
            tl.store(at, tl.sum(by_x, 0), mask=cols < K)
            tl.store(at + K, tl.sum(tl.where(ok, g * by_rate, 0.0), 0), mask=cols < K)
