"""The second and third kernel of the gradient of chunked KDA: the states before every chunk, and
the gradients of the states after every chunk.

With w, kg, qg, Aqk and T of `backward_prepare_kernel`, per chunk

    vn = u - w S,                S <- D S + kg^T vn                            forward,
    dvn = Aqk^T do + kg dS,      dS <- D dS + qg^T do - w^T dvn                backward,

and the gradient of v is beta T^T dvn. A forward whose gradient will be asked for runs the first as
its scan, with the output, `o = qg S + Aqk vn`, and saves what it leaves. Both have the structure of
the forward's scan: a program carries some columns of one head's state through one sequence. They
are independent of each other.

For few heads both run in segments of a sequence, as in `kda_ops.delta_rule.chunked.kernels.
scan_segments`, in two launches: the first computes how every segment but the last that a scan comes
to changes what enters it, `S -> M S + E`, and the second starts each segment from those before it.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import gradient_rows_of, gradient_tiles_of
from kda_ops.delta_rule.chunked.kernels.prepare import rows_between
from kda_ops.delta_rule.chunked.kernels.scan_segments import segment_chunks, segment_state
from kda_ops.delta_rule.chunked.kernels.tiles import place_of, rounds, sequence_part

MATRICES = tl.constexpr(9)


@triton.jit
def store_matrices(matrices_ptr, p, programs):
    """0/1 matrices [9, 64, 64] for `chunk_gradient_kernel`, by all programs of a launch before it:
    in fp16 those that sum gates to |G - G_a| at the six levels, to G and to G_last - G, and as bf16
    bits one that sums from each row to the last.

    They are the same for every chunk; computing them in registers takes as many instructions as
    everything else there.
    """
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    for which in range(p, MATRICES, programs):
        between = rows_between(i, j, 1 << tl.minimum(which, 5))
        upper = tl.where(which == 8, j >= i, j > i)
        chosen = tl.where(which < 6, between, tl.where(which == 6, j <= i, upper))
        one = tl.where(which == 8, 0x3F80, 0x3C00)
        tl.store(matrices_ptr + which * 4096 + i * 64 + j, tl.where(chosen, one, 0).to(tl.int16))


@triton.jit
def _clear(x_ptr, size, p, programs):
    """Zeros all of x, by all programs of a launch."""
    for first in range(p * 1024, size, programs * 1024):
        at = first + tl.arange(0, 1024)
        tl.store(x_ptr + at, 0.0, mask=at < size)


@triton.jit
def _place_of_program(
    p, N, HV: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr
):
    """The sequence, head, columns and turn of a program: which of a scan's segments it is."""
    pair = p // BLOCKS
    turn = pair * 0
    if SEGMENTS > 1:
        turn = pair // tl.maximum(N * HV, 1)
        pair -= turn * (N * HV)
    v = (p % BLOCKS).to(tl.int32) * BV + tl.arange(0, BV)
    return pair // HV, pair % HV, v, turn


@triton.jit
def _store_segment(
    E_ptr, M_ptr, S, pair, turn, d, v, K: tl.constexpr, V: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Stores columns of E [N, HV, SEGMENTS - 1, K, V] in fp32, and past V those of M, [N, HV,
    SEGMENTS - 1, K, K] in fp16.
    """
    at = (pair * (SEGMENTS - 1) + turn) * K + d[:, None]
    everywhere = (d >= 0)[:, None]
    tl.store(E_ptr + at * V + v[None, :], S, mask=everywhere & (v < V)[None, :])
    to = M_ptr + at * K + (v - V)[None, :]
    tl.store(to, S.to(tl.float16), mask=everywhere & (v >= V)[None, :])


@triton.jit
def states_forward_kernel(
    tiles_ptr, rows_ptr, E_ptr, M_ptr, states_ptr, initial_ptr, before_ptr, after_ptr, o_ptr,
    final_ptr, cu_ptr,
    T, N, first_row, rows,
    initial_n, initial_h, initial_v, initial_k, final_n, final_h, final_v, final_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr,
    SLABS: tl.constexpr, KEEP: tl.constexpr, SEGMENTS: tl.constexpr, FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of one head's state through one sequence, S [K, BV] in fp32,
    or through one of its SEGMENTS.
    Grid: (V / BV * (sequence, head) pairs * SEGMENTS), columns innermost; with FIRST, which only
    computes E and M, ((V + K) / BV * pairs * (SEGMENTS - 1)).

    With KEEP it writes the state before every chunk, and vn over u; unless they are None, it also
    writes the output [B, T, HV, V] and the final states. With SLABS a sequence that
    starts before the slab is read from `before` [HV, K, V], and one that ends after it is written
    to `after`.
    """
    BLOCKS: tl.constexpr = (V + K) // BV if FIRST else V // BV
    p = tl.program_id(0).to(tl.int64)
    n, h, v, turn = _place_of_program(p, N, HV, BLOCKS, BV, SEGMENTS)
    if n >= N:
        return
    if FIRST and (turn == 0) & (p % BLOCKS >= V // BV):
        return
    b, start, end, row, lo, hi, begins, ends = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if hi < lo:
        return
    if SEGMENTS > 1:
        lo, hi, ends = segment_chunks(lo, hi, turn, SEGMENTS)
        begins = turn == 0
        if not FIRST and turn > 0 and hi <= lo:
            return
    r = tl.arange(0, 64)
    d = tl.arange(0, K)
    state = d[:, None] * V + v[None, :]
    in_v = (v < V if FIRST else v >= 0)[None, :]
    S = tl.zeros((K, BV), tl.float32)
    if initial_ptr is not None:
        initial = (initial_n, initial_h, initial_v, initial_k)
        at = initial_ptr + place_of(initial, n, h, d, v)
        if SLABS or SEGMENTS > 1:
            S = tl.load(at, mask=begins & (d >= 0)[:, None] & in_v, other=0.0)
        else:
            S = tl.load(at)
        S = S.to(tl.float32)
    if SLABS and begins == 0:
        S = tl.load(before_ptr + h * (K * V) + state)
    if FIRST:
        S = tl.where(d[:, None] == (v - V)[None, :], 1.0, S)
    elif SEGMENTS > 1 and turn > 0:
        S = segment_state(E_ptr, M_ptr, n * HV + h, turn, d, v, K, V, SEGMENTS, 2)
    step = tl.full((), HV, tl.int64)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    w_ptr, kg_ptr, qg_ptr, A_ptr, _, u_ptr = gradient_tiles_of(tiles_ptr, row * HV + h, K, V)
    decay_ptr, _, _, _, _ = gradient_rows_of(rows_ptr, row * HV + h, K)
    states_at = states_ptr + (row * HV + h) * (K * V) + state
    TILE: tl.constexpr = 64 * (3 * K + V + 128)
    wide = r[:, None] * K + d[None, :]
    narrow = r[:, None] * V + v[None, :]
    square = r[:, None] * 64 + r[None, :]
    length = (end - start).to(tl.int32)
    o_at = ((b * T + start) * HV + h) * V + (r[:, None] * (HV * V) + v[None, :])
    for c in tl.range(lo, rounds(hi), num_stages=STAGES):
        w = tl.load(w_ptr + c * step * TILE + wide)
        if FIRST:
            u = tl.load(u_ptr + c * step * TILE + narrow, mask=in_v & (r >= 0)[:, None], other=0.0)
        else:
            u = tl.load(u_ptr + c * step * TILE + narrow)
        kg = tl.load(kg_ptr + c * step * TILE + wide)
        decay = tl.load(decay_ptr + c * step * (5 * K + 192) + d)
        if o_ptr is not None:
            qg = tl.load(qg_ptr + c * step * TILE + wide)
            A = tl.load(A_ptr + c * step * TILE + square)
        Sh = S.to(dtype)
        vn = (u.to(tl.float32) - tl.dot(w, Sh)).to(dtype)
        if KEEP:
            tl.store(states_at + c * step * (K * V), Sh)
            tl.store(u_ptr + c * step * TILE + narrow, vn)
        if o_ptr is not None:
            o = tl.dot(A, vn, tl.dot(qg, Sh)).to(o_ptr.dtype.element_ty)
            ok = (r < length - c * 64)[:, None] & (v >= 0)[None, :]
            tl.store(o_ptr + o_at + c * step * (64 * V), o, mask=ok)
        S = tl.dot(tl.trans(kg), vn, S * decay[:, None])
    if FIRST:
        _store_segment(E_ptr, M_ptr, S, n * HV + h, turn, d, v, K, V, SEGMENTS)
    if SLABS and not ends:
        tl.store(after_ptr + h * (K * V) + state, S)
    if final_ptr is not None:
        at = final_ptr + place_of((final_n, final_h, final_v, final_k), n, h, d, v)
        if SEGMENTS > 1:
            whole = ends & (d >= 0)[:, None] & in_v
            tl.store(at, S.to(final_ptr.dtype.element_ty), mask=whole)
        else:
            tl.store(at, S.to(final_ptr.dtype.element_ty))


@triton.jit
def states_backward_kernel(
    tiles_ptr, rows_ptr, E_ptr, M_ptr, dstates_ptr, do_ptr, dv_ptr, dfinal_ptr, dinitial_ptr,
    before_ptr, after_ptr, matrices_ptr, sums_ptr, sums_size, cu_ptr,
    T, N, first_row, rows,
    do_b, do_t, do_h, dfinal_n, dfinal_h, dfinal_v, dfinal_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr,
    SLABS: tl.constexpr, SEGMENTS: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of the gradient of one head's state back through one sequence,
    dS [K, BV] in fp32, or through one of its SEGMENTS, the last one in the first turn. Grid: as of
    `states_forward_kernel`.

    It writes the gradient of the state after every chunk, that of v [B, T, HV, V] and that of the
    initial state [N, HV, V, K], and clears `sums`. With SLABS a sequence that ends after the slab
    is read from `after` [HV, K, V], and one that starts before it is written to `before`.
    """
    BLOCKS: tl.constexpr = (V + K) // BV if FIRST else V // BV
    p = tl.program_id(0).to(tl.int64)
    if not FIRST:
        store_matrices(matrices_ptr, tl.program_id(0), tl.num_programs(0))
        if sums_ptr is not None:
            _clear(sums_ptr, sums_size, p, tl.num_programs(0))
    n, h, v, turn = _place_of_program(p, N, HV, BLOCKS, BV, SEGMENTS)
    if n >= N:
        return
    if FIRST and (turn == 0) & (p % BLOCKS >= V // BV):
        return
    b, start, end, row, lo, hi, begins, ends = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    length = (end - start).to(tl.int32)
    if hi < lo:
        return
    if SEGMENTS > 1:
        lo, hi, _ = segment_chunks(lo, hi, SEGMENTS - 1 - turn, SEGMENTS)
        begins = turn == SEGMENTS - 1
        ends = turn == 0
        if not FIRST and turn < SEGMENTS - 1 and hi <= lo:
            return
    r = tl.arange(0, 64)
    d = tl.arange(0, K)
    state = d[:, None] * V + v[None, :]
    in_v = (v < V if FIRST else v >= 0)[None, :]
    dS = tl.zeros((K, BV), tl.float32)
    if dfinal_ptr is not None:
        dfinal = (dfinal_n, dfinal_h, dfinal_v, dfinal_k)
        at = dfinal_ptr + place_of(dfinal, n, h, d, v)
        if SLABS or SEGMENTS > 1:
            dS = tl.load(at, mask=ends & (d >= 0)[:, None] & in_v, other=0.0)
        else:
            dS = tl.load(at)
        dS = dS.to(tl.float32)
    if SLABS and not ends:
        dS = tl.load(after_ptr + h * (K * V) + state)
    if FIRST:
        dS = tl.where(d[:, None] == (v - V)[None, :], 1.0, dS)
    elif SEGMENTS > 1 and turn > 0:
        dS = segment_state(E_ptr, M_ptr, n * HV + h, turn, d, v, K, V, SEGMENTS, 2)
    step = tl.full((), HV, tl.int64)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    w_ptr, kg_ptr, qg_ptr, A_ptr, T_ptr, _ = gradient_tiles_of(tiles_ptr, row * HV + h, K, V)
    decay_ptr, beta_ptr, _, _, _ = gradient_rows_of(rows_ptr, row * HV + h, K)
    states_at = dstates_ptr + (row * HV + h) * (K * V) + state
    TILE: tl.constexpr = 64 * (3 * K + V + 128)
    wide = r[:, None] * K + d[None, :]
    square = r[:, None] * 64 + r[None, :]
    do_at = do_ptr + b * do_b + h * do_h + start * do_t + (r[:, None] * do_t + v[None, :])
    dv_at = dv_ptr + ((b * T + start) * HV + h) * V + (r[:, None] * (HV * V) + v[None, :])
    do_step = tl.full((), 64, tl.int64) * do_t
    for i in tl.range(0, rounds(hi) - lo, num_stages=STAGES):
        c = hi - 1 - i
        ok = (r < length - c * 64)[:, None] & in_v
        kg = tl.load(kg_ptr + c * step * TILE + wide)
        A = tl.load(A_ptr + c * step * TILE + square)
        do = tl.load(do_at + c * do_step, mask=ok, other=0.0)
        qg = tl.load(qg_ptr + c * step * TILE + wide)
        w = tl.load(w_ptr + c * step * TILE + wide)
        if not FIRST:
            inverse = tl.load(T_ptr + c * step * TILE + square)
            beta = tl.load(beta_ptr + c * step * (5 * K + 192) + r)
        decay = tl.load(decay_ptr + c * step * (5 * K + 192) + d)
        dSh = dS.to(dtype)
        if not FIRST:
            tl.store(states_at + c * step * (K * V), dSh)
        do = do.to(dtype)
        minus = (-tl.dot(kg, dSh, tl.dot(tl.trans(A), do))).to(dtype)
        dS = tl.dot(tl.trans(qg), do, dS * decay[:, None])
        dS = tl.dot(tl.trans(w), minus, dS)
        if not FIRST:
            dv = tl.dot(tl.trans(inverse), minus) * -beta[:, None]
            tl.store(dv_at + c * step * (64 * V), dv.to(dv_ptr.dtype.element_ty), mask=ok)
    if FIRST:
        _store_segment(E_ptr, M_ptr, dS, n * HV + h, turn, d, v, K, V, SEGMENTS)
    if SLABS and begins == 0:
        tl.store(before_ptr + h * (K * V) + state, dS)
    if dinitial_ptr is not None:
        at = dinitial_ptr + (n * HV + h) * (V * K) + d[:, None] + v[None, :] * K
        first = begins & (d >= 0)[:, None] & in_v
        tl.store(at, dS.to(dinitial_ptr.dtype.element_ty), mask=first)
