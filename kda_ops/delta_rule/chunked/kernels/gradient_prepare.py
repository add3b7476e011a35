"""The first kernel of the gradient of chunked KDA: the scans' inputs of each chunk.

Unlike the forward's `prepare` it stores T = (I + diag(beta) M)^-1 as well as applying it. The
gradient of a chunk's rows is P = T^T dvn before beta: that of v is diag(beta) P, and that of beta
needs P itself, also where beta is 0. So T is joined from the identity, with the rows of M scaled by
beta, where the forward joins X = T diag(beta).
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.prepare import (
    block_diagonal,
    half_like,
    join,
    laid_out_as,
    large_level,
    multiply,
    small_decays,
    small_level,
)
from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_log2, reciprocal_norm, within_fp16
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import bias_row, quick_sigmoid

SMALLEST_BETA = tl.constexpr(1e-20)


@triton.jit
def gradient_tiles_of(tiles_ptr, work, K: tl.constexpr, V: tl.constexpr):
    """Pointers to w, kg, qg [64, K], Aqk, T [64, 64] and u, then vn [64, V] of a chunk, contiguous
    in its row.
    """
    w_ptr = tiles_ptr + work * (64 * (3 * K + V + 128))
    A_ptr = w_ptr + 192 * K
    return w_ptr, w_ptr + 64 * K, w_ptr + 128 * K, A_ptr, A_ptr + 4096, A_ptr + 8192


@triton.jit
def gradient_rows_of(rows_ptr, work, K: tl.constexpr):
    """Pointers to a chunk's decay [K], beta and reciprocal norms of q and k [64], and marks [4, K]:
    G at the last row of every 16.
    """
    decay_ptr = rows_ptr + work * (5 * K + 192)
    beta_ptr = decay_ptr + K
    return decay_ptr, beta_ptr, beta_ptr + 64, beta_ptr + 128, beta_ptr + 192


@triton.jit
def load_gates(gate_at, gate_t, t, GATED: tl.constexpr):
    """What `gates_of` reads of a chunk's tokens: unless GATED, the cumulative gate of the token
    before as well.
    """
    x = tl.load(gate_at)
    if GATED:
        return x, x
    else:
        return x, tl.load(gate_at - gate_t, mask=(t > 0)[:, None], other=0.0)


@triton.jit
def gates_of(gates, ok, a, bias, GATED: tl.constexpr, BOUND: tl.constexpr):
    """The gates in log2 of a chunk's tokens, within fp16, zero where not `ok`: from the raw gate
    or from the cumulative one.
    """
    x, before = gates
    y = gate_log2(x, a, bias, BOUND, True) if GATED else within_fp16(x - before)
    return tl.where(ok[:, None], y, 0.0)


@triton.jit
def unit_inverse(q, k, y, beta, PACKED: tl.constexpr):
    """All levels of one chunk, like `kda_ops.delta_rule.chunked.kernels.prepare.chunk_levels`: q, k
    [64, K], the tokens' gates y [64, K] in fp16 and beta [64].

    Returns q k^T with the decays and T, [64, 64], and q and k in fp16.
    """
    K: tl.constexpr = k.shape[1]
    q = tl.reshape(q.to(tl.float16), (4, 16, K))
    k = tl.reshape(k.to(tl.float16), (4, 16, K))
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    diagonal = (i == j)[None, :, :]
    y_blocks = tl.reshape(y, (4, 16, K))
    rows = tl.reshape(beta, (4, 16))[:, :, None]
    e = small_decays(i, j, y_blocks, 1)
    q = laid_out_as(q, e, PACKED)
    k = laid_out_as(k, e, PACKED)
    A = tl.where(diagonal, tl.dot(q, tl.permute(k, (0, 2, 1))), 0.0)
    e_next = small_decays(i, j, y_blocks, 2)
    A, M = small_level(A, multiply(k, e, PACKED), multiply(q, e, PACKED), i, j, 1)
    e = e_next
    X = tl.where(diagonal, 1.0, 0.0) - M * rows
    for level in tl.range(1, 3, num_stages=1):
        s = 1 << level
        ke = multiply(k, e, PACKED)
        qe = multiply(q, e, PACKED)
        e = small_decays(i, j, y_blocks, 2 * s)
        A, M = small_level(A, ke, qe, i, j, s)
        X = join(X, M * rows)
    A, M = small_level(A, multiply(k, e, PACKED), multiply(q, e, PACKED), i, j, 8)
    X = join(X, M * rows)
    A = block_diagonal(A)
    A, M = large_level(A, q, k, y, A, 16, PACKED)
    X = join(block_diagonal(X), M.to(tl.float32) * beta[:, None]).to(tl.float16)
    A, M = large_level(A, q, k, y, A, 32, PACKED)
    X = join(X, M.to(tl.float32) * beta[:, None])
    return A, X, tl.reshape(q, (64, K)), tl.reshape(k, (64, K))


@triton.jit
def backward_prepare_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, A_log_ptr, bias_ptr, tiles_ptr, rows_ptr, o_ptr,
    cu_ptr, chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, beta_b, beta_t, beta_h,
    SCALE: tl.constexpr, GATED: tl.constexpr, BOUND: tl.constexpr, BETA_SCALE: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
    SLABS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program prepares one chunk of one value head; K and V are 64 or 128.
    Grid: (chunks * HV), heads fastest.

    With GATED gate and beta are raw; else the gate is cumulative, in log2. With NORM, q and k are
    normalized as they are loaded, and the norms are stored. Rows of o [B, T, HV, V] past the last
    sequence are zeroed, unless it is None.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p, b, first, count, row, inside = slab_rows(
        p // HV, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and o_ptr is not None and count == 0:
            clear_padding(o_ptr, cu_ptr, p, h, T, N, NC, HV, V, V)
        return
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    d = tl.arange(0, K)
    ok = r < count
    t = tl.minimum(r, count - 1)
    q_at = (q_ptr + b * q_b + hk * q_h + first * q_t) + (t[:, None] * q_t + d[None, :])
    k_at = (k_ptr + b * k_b + hk * k_h + first * k_t) + (t[:, None] * k_t + d[None, :])
    gate_head = gate_ptr + b * gate_b + h * gate_h + first * gate_t
    gate_at = gate_head + (t[:, None] * gate_t + d[None, :])
    work = row * HV + h
    w_ptr, kg_ptr, qg_ptr, A_ptr, T_ptr, u_ptr = gradient_tiles_of(tiles_ptr, work, K, V)
    decay_ptr, rate_ptr, q_norm_ptr, k_norm_ptr, marks_ptr = gradient_rows_of(rows_ptr, work, K)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty

    a = gate_rate(A_log_ptr, h, HAS_A)
    bias = bias_row(bias_ptr, h * K + d, d < K, HAS_BIAS)
    y = gates_of(load_gates(gate_at, gate_t, t, GATED), ok, a, bias, GATED, BOUND)
    last = tl.sum(y, axis=0) if GATED else tl.load(gate_head + (count - 1) * gate_t + d)
    tl.store(decay_ptr + d, tl.exp2(last))
    y = y.to(tl.float16)
    k = tl.load(k_at)
    q = tl.load(q_at)
    beta_row = beta_ptr + b * beta_b + h * beta_h + first * beta_t
    beta = tl.load(beta_row + t * beta_t).to(tl.float32)
    if GATED:
        beta = BETA_SCALE * quick_sigmoid(beta)
    beta = tl.where(ok, beta, 0.0)
    tl.store(rate_ptr + r, tl.where(tl.abs(beta) < SMALLEST_BETA, SMALLEST_BETA, beta))
    if NORM:
        q_norm = reciprocal_norm(q, EPS)
        k_norm = reciprocal_norm(k, EPS)
        tl.store(q_norm_ptr + r, q_norm)
        tl.store(k_norm_ptr + r, k_norm)
        q = (q.to(tl.float32) * q_norm[:, None]).to(tl.float16)
        k = (k.to(tl.float32) * k_norm[:, None]).to(tl.float16)

    A, X, q, k = unit_inverse(q, k, y, beta, PACKED)
    tl.store(A_ptr + (i * 64 + j), (A * SCALE).to(dtype))
    tl.store(T_ptr + (i * 64 + j), X.to(dtype))
    # in two parts: rounding X would add as much error to u as rounding u does
    X = X * beta[None, :]
    rest = (X - X.to(dtype).to(tl.float32)).to(dtype)
    X = X.to(dtype)
    dv = tl.arange(0, V)[None, :]
    v = tl.load(v_ptr + b * v_b + h * v_h + first * v_t + (t[:, None] * v_t + dv))
    v = v.to(dtype)
    u = tl.dot(X, v, tl.dot(rest, v))
    tl.store(u_ptr + (i * V + dv), u.to(dtype))
    at = i * K + d[None, :]
    k = k.to(tl.float32)
    G = tl.dot(half_like(j <= i, X, PACKED), y)
    tl.store(marks_ptr + (i // 16 * K + d[None, :]), G, mask=(i % 16 == 15) & (d >= 0)[None, :])
    e = tl.exp2(G)
    tl.store(qg_ptr + at, (q.to(tl.float32) * SCALE * e).to(dtype))
    tl.store(w_ptr + at, tl.dot(X, (k * e).to(dtype)).to(dtype))
    e = tl.exp2(tl.dot(half_like(j > i, X, PACKED), y))  # 2^(G_last - G)
    tl.store(kg_ptr + at, (k * e).to(dtype))
