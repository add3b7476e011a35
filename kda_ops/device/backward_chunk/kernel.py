"""The last kernel of the gradient of chunked KDA: all of a chunk that its scans leave, one program per
chunk and value head, none of which waits for another.

With `dA = do vn^T` and `dL = -P vn^T`, P = dv / beta, the rows of dq, and of dk as a row (R) and as a
column (C) are

    dq_i = sum_j dA_ij 2^(G_i - G_j) k_j,   R_i = sum_j dL_ij 2^(G_i - G_j) k_j,   dk = beta R + C,
    C_j = sum_i 2^(G_i - G_j) (dA_ij q_i + beta_i dL_ij k_i)

over i > j, and what comes through the states. As in `kda_ops.device.prepare`, pairs of rows meet at
six levels, and one tile 2^-|G - G_a| per level serves both sides. Left rows take from the right ones
and right rows from the left ones, so two products make a level: with A and L filled above the
diagonal with what the left rows take, `A (q right, k left)` and `L k`.

Then `dG = q dq + k (beta R - C)`, in which the two terms of a pair cancel in the sum over the chunk
only if both see the same rounded factors: hence fp16 factors, one scale per tile of A and L.
beta's gradient is `P v + k R` summed over the row, without a division by what may be 0: the rows of
dv are beta P to the last bit also where beta is tiny, since `backward_prepare` keeps it off 0.
"""

import triton
import triton.language as tl

from kda_ops.device.backward_prepare.kernel import (
    gradient_rows_of,
    gradient_tiles_of,
    token_gates,
)
from kda_ops.device.chunk.kernel import clear_padding, slab_rows
from kda_ops.device.gated.kernel import gate_bias, gate_rate, gate_slopes
from kda_ops.device.prepare.kernel import half, multiply, opaque, rows_between

LN2 = tl.constexpr(0.6931471805599453)
MATRICES = 6


@triton.jit
def level_matrices_kernel(matrices_ptr, masks_ptr):
    """0/1 matrices [6, 64, 64] in fp16, by program: those that sum gates to G and to G_last - G, one
    that sums rows from each to the last, one [64, 16] that picks the 16 x 16 blocks of a diagonal,
    and those that sum to |G - G_a| at levels 16 and 32. For these masks [2, 64, 64] too: -1 in 16
    bits where rows and columns meet, on either side of the diagonal.

    They are the same for every chunk, and computed in registers they take as many instructions as
    all the rest.
    """
    p = tl.program_id(0)
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    at = i * 64 + j
    s = 1 << tl.minimum(p, 5)
    chosen = rows_between(i, j, s)
    if p == 0:
        chosen = j <= i
    elif p == 1:
        chosen = j > i
    elif p == 2:
        chosen = j >= i
    elif p == 3:
        chosen = (at < 1024) & (at // 16 % 16 == at % 16)
    else:
        meet = tl.where((i ^ j) // s == 1, -1, 0)
        tl.store(masks_ptr + (p - 4) * 4096 + at, meet.to(tl.int16))
    tl.store(matrices_ptr + p * 4096 + at, half(chosen))


@triton.jit
def _matrix(matrices_ptr, which: tl.constexpr):
    r = tl.arange(0, 64)
    return tl.load(matrices_ptr + which * 4096 + r[:, None] * 64 + r[None, :])


@triton.jit
def _masked(x, mask, PACKED: tl.constexpr):
    """x [.., n, n] in 16 bits where the mask is -1, else 0; two per instruction."""
    if PACKED:
        mask = tl.broadcast_to(mask, x.shape)
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where(mask != 0, x, 0.0)


@triton.jit
def _either(mask, a, b, PACKED: tl.constexpr):
    """a where the mask is -1, else b; two per instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;",
            "=r,r,r,r",
            [tl.broadcast_to(mask, a.shape), a, b],
            dtype=a.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(mask != 0, a, b)


@triton.jit
def _value_rows(
    do_ptr, do_t, vn_ptr, dv_ptr, count, zero, HV: tl.constexpr, V: tl.constexpr, D: tl.constexpr
):
    """do, vn and dv [64, V] of a chunk; rows past its end are zero."""
    r = (tl.arange(0, 64) + zero)[:, None]
    d = tl.arange(0, V)[None, :]
    ok = (r < count) & (d >= 0)
    do = tl.load(do_ptr + (r * do_t + d), mask=ok, other=0.0).to(D)
    vn = tl.load(vn_ptr + (r * V + d))
    dv = tl.load(dv_ptr + (r * (HV * V) + d), mask=ok, other=0.0).to(D)
    return do, vn, dv


@triton.jit
def _key_rows(x_at, norm_at, NORM: tl.constexpr):
    """Rows of q or k as they are used, in fp16."""
    x = tl.load(x_at)
    if NORM:
        x = x.to(tl.float32) * tl.load(norm_at)[:, None]
    return x.to(tl.float16)


@triton.jit
def _pair_tiles(do, vn, dv, beta, SCALE: tl.constexpr):
    """dA and dL [64, 64] below the diagonal, and above it what left rows take from right ones: dA and
    beta dL transposed; in fp16, divided by the scale, the largest below the diagonal. The scale, and
    the diagonal of dA.
    """
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    vt = tl.trans(vn)
    A = tl.dot(do, vt) * SCALE
    L = tl.dot(dv, vt) * (-1.0 / beta)[:, None]
    diagonal = tl.sum(tl.where(i == j, A, 0.0), 1)
    largest = tl.where(i > j, tl.maximum(tl.abs(A), tl.abs(L)), 0.0)
    scale = tl.maximum(tl.max(tl.max(largest, 1), 0), 1e-35)
    inverse = 1.0 / scale
    A = tl.where(i > j, A * inverse, 0.0).to(tl.float16)
    L = tl.where(i > j, L * inverse, 0.0).to(tl.float16)
    A += tl.where(i < j, tl.dot(vn, tl.trans(do)) * (SCALE * inverse), 0.0).to(tl.float16)
    L += tl.where(i < j, tl.dot(vn, tl.trans(dv)) * -inverse, 0.0).to(tl.float16)
    return A, L, scale, diagonal


@triton.jit
def _level(dq, C, R, e, q, k, A, L, meet, right, scale, PACKED: tl.constexpr):
    """Adds one level, in tiles [64, K] or [4, 16, K]; `meet`: -1 where rows and columns meet, `right`:
    the rows right of the anchor.
    """
    e = e.to(tl.float16)
    ke = multiply(k, e, PACKED)
    side = tl.where(right, -1, 0).to(tl.int16)
    P = tl.dot(_masked(A, meet, PACKED), _either(side, multiply(q, e, PACKED), ke, PACKED))
    # not one accumulator, and no sum that Triton makes one of: of chained products it puts all warps
    # along the rows
    t = tl.dot(_masked(L, meet, PACKED), ke) - tl.where(right, 0.0, -1.0) * P
    e = e.to(tl.float32) * scale
    from_left = e * tl.where(right, 1.0, 0.0)
    dq += from_left * P
    R += from_left * t
    C += (e - from_left) * t
    return dq, C, R


@triton.jit
def _levels(dq, C, R, q, k, y, A, L, A_blocks, L_blocks, scale, matrices_ptr, masks_ptr,
            PACKED: tl.constexpr):
    """All six levels. Loops, because at their edges the compiler mixes no levels."""
    BK: tl.constexpr = k.shape[1]
    r = tl.arange(0, 64)
    at = r[:, None] * 64 + r[None, :]
    for level in tl.range(4, 6, num_stages=1, disable_licm=True):
        e = tl.exp2(tl.dot(tl.load(matrices_ptr + level * 4096 + at), y))
        meet = tl.load(masks_ptr + (level - 4) * 4096 + at)
        right = ((r >> level) % 2 == 1)[:, None]
        dq, C, R = _level(dq, C, R, e, q, k, A, L, meet, right, scale, PACKED)
    q = tl.reshape(q, (4, 16, BK))
    k = tl.reshape(k, (4, 16, BK))
    y = tl.reshape(y, (4, 16, BK))
    dq = tl.reshape(dq, (4, 16, BK))
    C = tl.reshape(C, (4, 16, BK))
    R = tl.reshape(R, (4, 16, BK))
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    for level in tl.range(0, 4, num_stages=1, disable_licm=True):
        s = 1 << level
        between = tl.broadcast_to(rows_between(i, j, s)[None, :, :], (4, 16, 16))
        e = tl.exp2(tl.dot(half(between), y))
        meet = tl.where((i ^ j) // s == 1, -1, 0).to(tl.int16)[None, :, :]
        right = ((i // s) % 2 == 1)[None, :, :]
        dq, C, R = _level(dq, C, R, e, q, k, A_blocks, L_blocks, meet, right, scale, PACKED)
    return tl.reshape(dq, (64, BK)), tl.reshape(C, (64, BK)), tl.reshape(R, (64, BK))


@triton.jit
def _sum_from_each(x, matrices_ptr):
    """The sums of x [64, n] over the rows from each on, as products of two bf16 parts."""
    ones = _matrix(matrices_ptr, 2).to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    low = (high.to(tl.float32) - x).to(tl.bfloat16)
    return tl.dot(ones, high) - tl.dot(ones, low)


@triton.jit
def chunk_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gate_ptr,
    A_log_ptr,
    bias_ptr,
    do_ptr,
    dv_ptr,
    tiles_ptr,
    rows_ptr,
    states_ptr,
    matrices_ptr,
    masks_ptr,
    dq_ptr,
    dk_ptr,
    dgate_ptr,
    dbeta_ptr,
    sums_ptr,
    cu_ptr,
    chunks_ptr,
    T,
    N,
    NC,
    first_row,
    rows,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    gate_b,
    gate_t,
    gate_h,
    do_b,
    do_t,
    do_h,
    SCALE: tl.constexpr,
    GATED: tl.constexpr,
    BOUND: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One program finishes one chunk of one value head, BK key columns at a time.
    Grid: (chunks * HV), heads fastest.

    It reads dv [B, T, HV, V] and writes dq and dk [B, T, HV, K], the gradients of the gate and of
    beta, and with `sums` [rows, HV, 2, K] the sums over its tokens of the gradients of dt_bias and
    A_log, to which those of earlier slabs are added. What is None is not computed. With NORM and a
    value head per key head, dq and dk are those before the norm.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p, b, first, count, row, inside = slab_rows(
        p // HV, chunks_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(dv_ptr, cu_ptr, p, h, T, N, NC, HV, V, V)
            if dq_ptr is not None:
                clear_padding(dq_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
            if dk_ptr is not None:
                clear_padding(dk_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
            if dgate_ptr is not None:
                clear_padding(dgate_ptr, cu_ptr, p, h, T, N, NC, HV, K, K)
            if dbeta_ptr is not None:
                clear_padding(dbeta_ptr, cu_ptr, p, h, T, N, NC, HV, 1, 1)
        return
    hk = h // (HV // H)
    work = row * HV + h
    _, _, _, _, _, vn_ptr = gradient_tiles_of(tiles_ptr, work, K, V)
    decay_ptr, beta_ptr, q_norm_ptr, k_norm_ptr = gradient_rows_of(rows_ptr, work, K)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    r = tl.arange(0, 64)
    i = r[:, None]
    d = tl.arange(0, V)[None, :]
    a = tl.arange(0, BK)
    token = b * T + first
    do_ptr += b * do_b + h * do_h + first * do_t
    dv_ptr += (token * HV + h) * V
    v_ptr += b * v_b + h * v_h + first * v_t
    q_ptr += b * q_b + hk * q_h + first * q_t
    k_ptr += b * k_b + hk * k_h + first * k_t
    gate_ptr += b * gate_b + h * gate_h + first * gate_t
    out = (token * HV + h) * K
    states_ptr += work * (2 * K * V)
    rate = gate_rate(A_log_ptr, h, HAS_A)

    do, vn, dv = _value_rows(do_ptr, do_t, vn_ptr, dv_ptr, count, 0, HV, V, dtype)
    beta = tl.load(beta_ptr + r)
    A, L, scale, diagonal = _pair_tiles(do, vn, dv, beta, SCALE)
    pick = tl.load(matrices_ptr + 3 * 4096 + i * 16 + tl.arange(0, 16)[None, :])
    same = tl.where(i // 16 == r[None, :] // 16, -1, 0).to(tl.int16)
    A_blocks = tl.reshape(tl.dot(_masked(A, same, PACKED), pick).to(tl.float16), (4, 16, 16))
    L_blocks = tl.reshape(tl.dot(_masked(L, same, PACKED), pick).to(tl.float16), (4, 16, 16))
    v = tl.load(v_ptr + (tl.minimum(r, count - 1)[:, None] * v_t + d))
    dbeta = tl.sum(dv.to(tl.float32) * v.to(tl.float32), 1) / beta
    q_dot = tl.zeros((64,), tl.float32)
    k_dot = tl.zeros((64,), tl.float32)

    for n in tl.range(0, K // BK, num_stages=1, disable_licm=True):
        k0 = n * BK
        zero = opaque(n, PACKED) - n  # what is made with it is not kept from round to round
        t = tl.minimum(r + zero, count - 1)[:, None]
        # again: in registers they would be in the way of the tiles
        do, vn, dv = _value_rows(do_ptr, do_t, vn_ptr, dv_ptr, count, zero, HV, V, dtype)
        state = states_ptr + (k0 + a)[:, None] * V + d
        S = tl.load(state)
        dS = tl.load(state + K * V)
        decay = tl.load(decay_ptr + k0 + a)
        last = decay * tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        bias = gate_bias(bias_ptr, h * K + k0 + a, a < BK, HAS_BIAS)
        gate_at = gate_ptr + k0 + (t * gate_t + a[None, :])
        y = token_gates(
            gate_at, gate_t, r + zero, r + zero < count, rate, bias, GATED, BOUND
        ).to(tl.float16)
        C = tl.dot(vn, tl.trans(dS)) * tl.exp2(tl.dot(_matrix(matrices_ptr, 1), y))
        e = tl.exp2(tl.dot(_matrix(matrices_ptr, 0), y))
        R = tl.dot(dv, tl.trans(S)) * (e * (-1.0 / beta)[:, None])
        dq = tl.dot(do, tl.trans(S)) * (e * SCALE)
        q = _key_rows(q_ptr + k0 + (t * q_t + a[None, :]), q_norm_ptr + r + zero, NORM)
        k = _key_rows(k_ptr + k0 + (t * k_t + a[None, :]), k_norm_ptr + r + zero, NORM)
        last += tl.sum(k.to(tl.float32) * C, 0)
        dq, C, R = _levels(
            dq, C, R, q, k, y, A, L, A_blocks, L_blocks, scale, matrices_ptr, masks_ptr, PACKED
        )
        # what was loaded before the levels is loaded again
        zero = opaque(n, PACKED) - n
        rows_at = r + zero
        t = tl.minimum(rows_at, count - 1)[:, None]
        ok = (rows_at < count)[:, None] & (a >= 0)[None, :]
        to = out + k0 + (rows_at[:, None] * (HV * K) + a[None, :])
        q = _key_rows(q_ptr + k0 + (t * q_t + a[None, :]), q_norm_ptr + rows_at, NORM)
        k = _key_rows(k_ptr + k0 + (t * k_t + a[None, :]), k_norm_ptr + rows_at, NORM)
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        dbeta += tl.sum(k * R, 1)
        R = R * beta[:, None]
        if dgate_ptr is not None or sums_ptr is not None:
            dG = tl.where(ok, q * dq + k * (R - C), 0.0)
            dG += tl.where((rows_at == count - 1)[:, None], last[None, :], 0.0)
            if GATED:
                dG = _sum_from_each(dG, matrices_ptr)
                x = tl.load(gate_ptr + k0 + (t * gate_t + a[None, :]))
                bias = gate_bias(bias_ptr, h * K + k0 + a + zero, a < BK, HAS_BIAS)
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
        dq += diagonal[:, None] * k
        dk = C + R + diagonal[:, None] * q
        if NORM and H == HV:
            q_dot += tl.sum(dq * q, 1)
            k_dot += tl.sum(dk * k, 1)
        if dq_ptr is not None:
            tl.store(dq_ptr + to, dq.to(dq_ptr.dtype.element_ty), mask=ok)
        if dk_ptr is not None:
            tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=ok)
    if dbeta_ptr is not None:
        if GATED:
            dbeta *= beta * (1.0 - beta * (1.0 / BETA_SCALE))
        at = dbeta_ptr + (token + r) * HV + h
        tl.store(at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=r < count)
    if NORM and H == HV:
        tl.debug_barrier()
        for n in tl.range(0, K // BK, num_stages=1, disable_licm=True):
            k0 = n * BK
            to = out + k0 + (i * (HV * K) + a[None, :])
            t = tl.minimum(r, count - 1)[:, None]
            ok = (r < count)[:, None] & (a >= 0)[None, :]
            if dq_ptr is not None:
                x_at = q_ptr + k0 + (t * q_t + a[None, :])
                _through_norm(x_at, q_norm_ptr, q_dot, dq_ptr + to, ok)
            if dk_ptr is not None:
                x_at = k_ptr + k0 + (t * k_t + a[None, :])
                _through_norm(x_at, k_norm_ptr, k_dot, dk_ptr + to, ok)


@triton.jit
def _through_norm(x_at, norm_ptr, dot, dx_at, stored):
    """Turns the gradient of normalised rows, at `dx`, into that of x; `dot`: its products with the
    normalised rows.
    """
    norm = tl.load(norm_ptr + tl.arange(0, 64))[:, None]
    y = tl.load(x_at).to(tl.float32) * norm
    dy = tl.load(dx_at, mask=stored, other=0.0)
    tl.store(dx_at, (norm * (dy - y * dot[:, None])).to(dy.dtype), mask=stored)
