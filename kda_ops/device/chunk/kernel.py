"""What the kernels of chunked KDA have in common: one operator takes the cumulative gate, another
the raw one.

Two kernels, `prepare` and `scan`, or one of each in general form. Between them lies a workspace
with one row per (chunk, value head): `w`, `kg`, `qg [64, K]`, `u [64, V]`, `Aqk [64, 64]` and the
chunk's decay `[K]`. The row of chunk c of sequence n is `cu_seqlens[n] // 64 + n + c`, which needs
no table, is different for every chunk and below `T // 64 + N`. bf16 `u` needs no room of its own:
it is as large as the output and lies there until `scan` puts the output in its place.

A workspace that would be too large (`kda_ops.chunks.workspace_slabs`) holds a slab of the rows at a
time: both kernels run once per slab, and fp32 states `S [N, HV, K, V]` are carried from one to the
next.

Every power of two has an exponent <= 0, whatever the gate. Rows i and j < i of a chunk meet at
exactly one level s of 1, 2, ..., 32: in one block of 2s rows, i in its right and j in its left
half. With a the last row of the left half, 2^(G_i - G_j) = 2^(G_i - G_a) 2^(G_a - G_j), so one tile
2^-|G - G_a| per level serves as the row factor on the right and as the column factor on the left.
The inverse of I + L is joined level by level in the same way: X <- X - X L_s X.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.choice import choose
from kda_ops.choice.examples import NoHintError, hint
from kda_ops.chunks import workspace_row, workspace_rows, workspace_slabs
from kda_ops.formulas import CHUNK


@triton.jit
def _sequence(cu_ptr, n, T, N, VARLEN: tl.constexpr):
    """Batch row, first token and end of sequence n, and its first workspace row; in bounds for any
    offsets.
    """
    if VARLEN:
        b = n * 0
        start = tl.load(cu_ptr + n, mask=n < N, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), T)
        end = tl.load(cu_ptr + n + 1, mask=n < N, other=0).to(tl.int64)
        end = tl.minimum(tl.maximum(end, start), T)
        row = start // 64 + n
    else:
        b = n
        start = n * 0
        end = n * 0 + T
        row = n * T // 64 + n
    return b, start, end, row


@triton.jit
def chunk_rows(p, chunks_ptr, cu_ptr, T, N, NC, VARLEN: tl.constexpr):
    """Batch row, first token, token count (0: nothing to do) and workspace row of program p's
    chunk.

    With `cu_seqlens` NC is the number of rows of the chunk table, of which any may be wrong;
    without, NC programs per batch row are launched.
    """
    if VARLEN:
        listed = p < NC
        n = tl.load(chunks_ptr + 2 * p, mask=listed, other=-1).to(tl.int64)
        c = tl.load(chunks_ptr + 2 * p + 1, mask=listed, other=-1).to(tl.int64)
        real = (n >= 0) & (n < N) & (c >= 0)
        n = tl.where(real, n, 0)
        c = tl.where(real, c, T // 64 + 1)
    else:
        n = p // NC
        c = p % NC
    b, start, end, row = _sequence(cu_ptr, n, T, N, VARLEN)
    first = start + c * 64
    count = tl.maximum(tl.minimum(end - first, 64), 0).to(tl.int32)
    return b, first, count, row + c


@triton.jit
def slab_rows(
    p, chunks_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN: tl.constexpr, SLABS: tl.constexpr
):
    """`chunk_rows` in a slab of the workspace, with p, and whether the chunk is in the slab.

    Program p's row is between p and p + N, so a slab's chunks are those of `rows + N` programs.
    """
    if SLABS:
        p += tl.maximum(first_row - N, 0)
    b, first, count, row = chunk_rows(p, chunks_ptr, cu_ptr, T, N, NC, VARLEN)
    inside = count > 0
    if SLABS:
        if not VARLEN:
            inside = inside & (b < N)  # there are more programs than chunks
        row -= first_row
        inside = inside & (row >= 0) & (row < rows)
    return p, b, first, count, row, inside


@triton.jit
def clear_padding(
    o_ptr, cu_ptr, p, h, T, N, NC, HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr
):
    """Zeroes 64 of the rows that lie past the last sequence, counted from the end of the tokens.

    The programs without a chunk do it. They are the last of the NC + 1, and they suffice: there are
    at most `end // 64 + N` chunks.
    """
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + N).to(tl.int64), 0), T)
    t = T - (NC + 1 - p) * 64 + tl.arange(0, 64)
    d = tl.arange(0, VP)
    zero = tl.zeros((64, VP), tl.float32).to(o_ptr.dtype.element_ty)
    ok = ((t >= end) & (t < T))[:, None] & (d < V)[None, :]
    tl.store(o_ptr + (t[:, None] * HV + h) * V + d[None, :], zero, mask=ok)


@triton.jit
def _multiply(a, b, PACKED: tl.constexpr):
    """A product of fp16 tiles, on NVIDIA GPUs two per instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.float16)


@triton.jit
def half(mask):
    """A mask as fp16 zeros and ones."""
    return tl.where(mask, 1.0, 0.0).to(tl.float16)


@triton.jit
def _meet(i, j, s):
    """Whether rows i and columns j meet at level s."""
    return (i // (2 * s) == j // (2 * s)) & ((i // s) % 2 == 1) & ((j // s) % 2 == 0)


@triton.jit
def _between(i, t, s):
    """The 0/1 matrix that sums the tokens' gates between row i and its anchor at level s: its
    product with y is -|G_i - G_a|.
    """
    a = (i // (2 * s)) * (2 * s) + s - 1
    return half((t > tl.minimum(i, a)) & (t <= tl.maximum(i, a)))


@triton.jit
def join(X, L):
    """The inverse with one more level L of the lower triangle. Entries stay bounded (`|k| <= 1`),
    so fp16 does as well as tf32.
    """
    Xh = X.to(tl.float16)
    return X - tl.dot(tl.dot(Xh, L.to(tl.float16)).to(tl.float16), Xh)


@triton.jit
def _small_level(X, A, i, j, q, k, y, beta, s: tl.constexpr, PACKED: tl.constexpr):
    """A level s <= 8 of the four 16-row blocks: q, k, y [4, 16, K] -> inverse and q k^T, [4, 16,
    16].
    """
    between = tl.broadcast_to(_between(i, j, s)[None, :, :], (4, 16, 16))
    e = tl.exp2(tl.dot(between, y)).to(k.dtype)  # [4, 16, K]
    ke = _multiply(k, e, PACKED)
    qe = _multiply(q, e, PACKED)
    columns = tl.permute(ke, (0, 2, 1))
    meet = _meet(i, j, s)[None, :, :]
    L = tl.where(meet, tl.dot(ke, columns) * beta, 0.0)
    A = tl.where(meet, tl.dot(qe, columns), A)
    X = X - L if s == 1 else join(X, L)
    return X, A


@triton.jit
def block_diagonal(x):
    """[4, 16, 16] -> [64, 64]."""
    r = tl.arange(0, 64)
    x = tl.broadcast_to(tl.reshape(x, (4, 16, 1, 16)), (4, 16, 4, 16))
    return tl.where(r[:, None] // 16 == r[None, :] // 16, tl.reshape(x, (64, 64)), 0.0)


@triton.jit
def chunk_levels(q, k, y, beta, PACKED: tl.constexpr):
    """All levels of one chunk: q, k [4, 16, K], the tokens' gates y [64, K] in fp16, beta [64].

    Returns q k^T with the decays [64, 64], the inverse of the 16-row blocks [4, 16, 16], and levels
    16 and 32 of L, [64, 64] in fp16.

    Normalised q and k and their decays are at most 1 in magnitude, so the products are made in
    fp16: three bits more than bf16, and an eighth less error of the output.
    """
    K: tl.constexpr = k.shape[2]
    q = q.to(tl.float16)
    k = k.to(tl.float16)
    r = tl.arange(0, 64)
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    diagonal = (i == j)[None, :, :]
    y_blocks = tl.reshape(y, (4, 16, K))
    beta_blocks = tl.reshape(beta, (4, 16))[:, :, None]
    X = tl.where(diagonal, 1.0, 0.0) + tl.zeros((4, 16, 16), tl.float32)
    A = tl.where(diagonal, tl.dot(q, tl.permute(k, (0, 2, 1))), 0.0)
    X, A = _small_level(X, A, i, j, q, k, y_blocks, beta_blocks, 1, PACKED)
    X, A = _small_level(X, A, i, j, q, k, y_blocks, beta_blocks, 2, PACKED)
    X, A = _small_level(X, A, i, j, q, k, y_blocks, beta_blocks, 4, PACKED)
    X, A = _small_level(X, A, i, j, q, k, y_blocks, beta_blocks, 8, PACKED)
    i = r[:, None]
    j = r[None, :]
    A = block_diagonal(A)

    meet = _meet(i, j, 16)
    e = tl.reshape(tl.exp2(tl.dot(_between(i, j, 16), y)).to(k.dtype), (4, 16, K))
    ke = tl.reshape(_multiply(k, e, PACKED), (64, K))
    columns = tl.trans(ke)
    A = tl.where(meet, tl.dot(tl.reshape(_multiply(q, e, PACKED), (64, K)), columns), A)
    L16 = tl.where(meet, tl.dot(ke, columns) * beta[:, None], 0.0).to(tl.float16)

    meet = _meet(i, j, 32)
    e = tl.reshape(tl.exp2(tl.dot(_between(i, j, 32), y)).to(k.dtype), (4, 16, K))
    ke = tl.reshape(_multiply(k, e, PACKED), (64, K))
    columns = tl.trans(ke)
    A = tl.where(meet, tl.dot(tl.reshape(_multiply(q, e, PACKED), (64, K)), columns), A)
    L32 = tl.where(meet, tl.dot(ke, columns) * beta[:, None], 0.0).to(tl.float16)
    return A, X, L16, L32


@triton.jit
def store_u(
    u_ptr,
    o_ptr,
    u,
    work,
    token,
    count,
    h,
    HV: tl.constexpr,
    V: tl.constexpr,
    v0,
    BLOCK: tl.constexpr,
):
    """Columns v0 to v0 + BLOCK of a chunk's u: to its workspace row, or without one to the output's
    `count` rows from `token` on.
    """
    r = tl.arange(0, 64)[:, None]
    v = (v0 + tl.arange(0, BLOCK))[None, :]
    if u_ptr is None:
        at = o_ptr + (token * HV + h) * V + (r * (HV * V) + v)
        tl.store(at, u.to(o_ptr.dtype.element_ty), mask=(r < count) & (v < V))
    else:
        at = u_ptr + work * (64 * V) + (r * V + v)
        tl.store(at, u.to(u_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _dot(a, b):
    """A product whose fp32 operands keep all their bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def chunk_prepare_general_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    G_ptr,
    beta_ptr,
    o_ptr,
    w_ptr,
    u_ptr,
    kg_ptr,
    qg_ptr,
    A_ptr,
    decay_ptr,
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
    G_b,
    G_t,
    G_h,
    beta_b,
    beta_t,
    beta_h,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BLOCK: tl.constexpr,
    FP32: tl.constexpr,
):
    """One program prepares one chunk of one value head, in blocks of BLOCK key or value columns.
    Grid: (chunks, HV).

    The workspace is KP columns wide, and zero past K. Products are made in v's dtype, those of
    the inverse in fp16, or all in full fp32.
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    p, b, first, count, row, inside = slab_rows(
        p, chunks_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
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
        A += tl.where(i == j, _dot(q.to(dtype), tl.trans(k.to(dtype))), 0.0)
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
            meet = _meet(i, j, s)
            A += tl.where(meet, _dot((q * e).to(dtype), columns), 0.0)
            L += tl.where(meet, _dot((k * e).to(dtype), columns), 0.0)
    L = L * beta[:, None]
    X = tl.where(i == j, 1.0, 0.0)
    for level in range(6):
        Xi = X.to(inverse)
        LX = _dot(tl.where(_meet(i, j, 1 << level), L, 0.0).to(inverse), Xi)
        X = X - _dot(Xi, LX.to(inverse))
    X = (X * beta[None, :]).to(dtype)

    work = row * HV + h
    tl.store(A_ptr + work * 4096 + i * 64 + j, (A * SCALE).to(A_ptr.dtype.element_ty))
    for k0 in range(0, KP, BLOCK):
        cols = (k0 + d)[None, :]
        q = tl.load(q_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        k = tl.load(k_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        G = tl.load(G_row + cols, mask=cols < K, other=0.0)
        last = tl.load(G_head + (first + count - 1) * G_t + k0 + d, mask=k0 + d < K, other=0.0)
        tl.store(decay_ptr + work * KP + k0 + d, tl.exp2(last))
        at = work * (64 * KP) + i * KP + cols
        e = tl.exp2(G)
        tl.store(kg_ptr + at, (k * tl.exp2(last[None, :] - G)).to(kg_ptr.dtype.element_ty))
        tl.store(qg_ptr + at, (q * e * SCALE).to(qg_ptr.dtype.element_ty))
        w = _dot(X, (k * e).to(dtype))
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty))
    v_head = v_ptr + b * v_b + h * v_h + t[:, None] * v_t
    for v0 in range(0, V, BLOCK):
        cols = (v0 + d)[None, :]
        u = _dot(X, tl.load(v_head + cols, mask=ok & (cols < V), other=0.0))
        store_u(u_ptr, o_ptr, u, work, b * T + first, count, h, HV, V, v0, BLOCK)


@triton.jit
def _slab_chunks(row, chunks, first_row, rows):
    """Of a sequence with its first workspace row: its first row in this slab, its chunks lo to hi
    there, and whether it begins there; hi < lo if it has no part in it.

    An empty sequence counts as one row. What a slab leaves as the final state is replaced by the
    sequence's next slab.
    """
    row -= first_row
    used = tl.maximum(chunks, 1)
    lo = tl.maximum(-row, 0).to(tl.int32)
    hi = tl.minimum(chunks, rows - row).to(tl.int32)
    hi = tl.where((row < rows) & (row + used > 0), hi, lo - 1)
    return row, lo, hi, row >= 0


@triton.jit
def _page(indices_ptr, n, slots, PAGED: tl.constexpr):
    """The state's page of sequence n, and whether it is one (slot 0 and slots out of range are
    not).
    """
    if PAGED:
        page = tl.load(indices_ptr + n).to(tl.int64)
        live = (page > 0) & (page < slots)
        page = tl.where(live, page, 0)
    else:
        page = n
        live = n >= 0
    return page, live


@triton.jit
def _clear_sequence(o_ptr, b, start, end, h, T, v, HV: tl.constexpr, V: tl.constexpr):
    """Zeroes the output columns v of one sequence and head."""
    t = start + tl.arange(0, 64)
    zero = tl.zeros((64, v.shape[0]), tl.float32).to(o_ptr.dtype.element_ty)
    for c in range(0, tl.cdiv(end - start, 64)):
        tc = t + c * 64
        at = ((b * T + tc)[:, None] * HV + h) * V + v[None, :]
        tl.store(o_ptr + at, zero, mask=(tc < end)[:, None] & (v < V)[None, :])


@triton.jit
def _to_half(x):
    """The fp16 form of x with every column scaled to at most 1, and the columns' scales."""
    m = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)[None, :]
    return (x * (1.0 / m)).to(tl.float16), m


@triton.jit
def chunk_scan_kernel(
    w_ptr,
    u_ptr,
    kg_ptr,
    qg_ptr,
    A_ptr,
    decay_ptr,
    S_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    indices_ptr,
    has_initial_ptr,
    cu_ptr,
    T,
    N,
    first_row,
    rows,
    slots,
    initial_n,
    initial_h,
    initial_v,
    initial_k,
    final_n,
    final_h,
    final_v,
    final_k,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program carries BV columns of one head's state through one sequence, S [KP, BV] in fp32
    registers. Grid: (V blocks * HV * N), V blocks innermost: the programs of one head read the same
    w, kg, qg and Aqk at about the same time.

    With HALF (fp16 inputs) the operands S and vn are scaled by column, so that no value overflows.
    With SLABS it takes the chunks of one slab, and S goes to S_ptr, from where it comes in the
    sequence's next slab.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    n = p // (blocks * HV)
    if n >= N:
        return
    h = (p // blocks) % HV
    v = (p % blocks).to(tl.int32) * BV + tl.arange(0, BV)
    b, start, end, row = _sequence(cu_ptr, n, T, N, VARLEN)
    lo = 0
    hi = tl.cdiv(end - start, 64).to(tl.int32)
    if SLABS:
        row, lo, hi, begins = _slab_chunks(row, hi, first_row, rows)
        if hi < lo:
            return
    page, live = _page(indices_ptr, n, slots, PAGED)
    if live == 0:
        _clear_sequence(o_ptr, b, start, end, h, T, v, HV, V)
        return
    r = tl.arange(0, 64)
    d = tl.arange(0, KP)
    in_state = (d < K)[:, None] & (v < V)[None, :]
    S = tl.zeros((KP, BV), tl.float32)
    if PAGED:
        read = in_state
        if HAS_INITIAL:
            read = in_state & (tl.load(has_initial_ptr + n) != 0)
        if SLABS:
            read = read & begins
        at = page * final_n + h * final_h + d[:, None] * final_k + v[None, :] * final_v
        S = tl.load(final_ptr + at, mask=read, other=0.0).to(tl.float32)
    elif INITIAL:
        at = n * initial_n + h * initial_h + d[:, None] * initial_k + v[None, :] * initial_v
        read = in_state
        if SLABS:
            read = read & begins
        S = tl.load(initial_ptr + at, mask=read, other=0.0).to(tl.float32)
    if SLABS:
        carried = S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :]
        S += tl.load(carried, mask=(v < V)[None, :] & (begins == 0), other=0.0)

    step = tl.full((), HV, tl.int64)
    work = row * HV + h
    tile = r[:, None] * KP + d[None, :]
    w_at = w_ptr + work * (64 * KP) + tile
    kg_at = kg_ptr + work * (64 * KP) + tile
    qg_at = qg_ptr + work * (64 * KP) + tile
    if u_ptr is not None:
        u_at = u_ptr + work * (64 * V) + r[:, None] * V + v[None, :]
    A_at = A_ptr + work * 4096 + r[:, None] * 64 + r[None, :]
    decay_at = decay_ptr + work * KP + d
    o_at = o_ptr + ((b * T + start + r)[:, None] * HV + h) * V + v[None, :]
    in_v = (v < V)[None, :]
    length = (end - start).to(tl.int32)
    for c in tl.range(lo, hi, num_stages=STAGES):
        ok = (r < length - c * 64)[:, None] & in_v
        w = tl.load(w_at + c * step * (64 * KP))
        if u_ptr is None:
            u = tl.load(o_at + c * step * (64 * V), mask=ok, other=0.0)
        else:
            u = tl.load(u_at + c * step * (64 * V), mask=in_v, other=0.0)
        kg = tl.load(kg_at + c * step * (64 * KP))
        qg = tl.load(qg_at + c * step * (64 * KP))
        A = tl.load(A_at + c * step * 4096)
        decay = tl.load(decay_at + c * step * KP)
        if HALF:
            Sh, S_scale = _to_half(S)
            vn, vn_scale = _to_half(u.to(tl.float32) - tl.dot(w, Sh) * S_scale)
            o = tl.dot(qg, Sh) * S_scale + tl.dot(A, vn) * vn_scale
            S = S * decay[:, None] + tl.dot(tl.trans(kg), vn) * vn_scale
        else:
            Sh = S.to(w.dtype)
            vn = (u.to(tl.float32) - tl.dot(w, Sh)).to(w.dtype)
            o = tl.dot(qg, Sh)
            S = tl.dot(tl.trans(kg), vn, S * decay[:, None])
            o = tl.dot(A, vn, o)
        tl.store(o_at + c * step * (64 * V), o.to(o_ptr.dtype.element_ty), mask=ok)
    if FINAL:
        at = page * final_n + h * final_h + d[:, None] * final_k + v[None, :] * final_v
        tl.store(final_ptr + at, S.to(final_ptr.dtype.element_ty), mask=in_state)
    if SLABS:
        tl.store(carried, S, mask=(v < V)[None, :])


@triton.jit
def chunk_scan_fp32_kernel(
    w_ptr,
    u_ptr,
    kg_ptr,
    qg_ptr,
    A_ptr,
    decay_ptr,
    S_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    indices_ptr,
    has_initial_ptr,
    cu_ptr,
    T,
    N,
    first_row,
    rows,
    slots,
    initial_n,
    initial_h,
    initial_v,
    initial_k,
    final_n,
    final_h,
    final_v,
    final_k,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """One program carries BV columns of one head's state through one sequence, in full fp32. Grid:
    (V blocks * HV * N).

    Dots in full fp32 run on ordinary registers, so the state is kept in memory (S [N, HV, KP, V])
    and vn in the place of u, and both are worked on in blocks of BLOCK rows; a barrier stands
    before and after each time that a program reads what it wrote.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    n = p // (blocks * HV)
    if n >= N:
        return
    h = (p // blocks) % HV
    v = (p % blocks).to(tl.int32) * BV + tl.arange(0, BV)
    b, start, end, row = _sequence(cu_ptr, n, T, N, VARLEN)
    lo = 0
    hi = tl.cdiv(end - start, 64).to(tl.int32)
    if SLABS:
        row, lo, hi, begins = _slab_chunks(row, hi, first_row, rows)
        if hi < lo:
            return
    page, live = _page(indices_ptr, n, slots, PAGED)
    if live == 0:
        _clear_sequence(o_ptr, b, start, end, h, T, v, HV, V)
        return
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    in_v = (v < V)[None, :]
    S_at = S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :]
    read = in_v
    if HAS_INITIAL:
        read = in_v & (tl.load(has_initial_ptr + n) != 0)
    fresh = KP
    if SLABS:
        fresh = tl.where(begins, KP, 0)
    for k0 in range(0, fresh, BLOCK):
        keys = (k0 + d)[:, None]
        S = tl.zeros((BLOCK, BV), tl.float32)
        if PAGED:
            at = page * final_n + h * final_h + keys * final_k + v[None, :] * final_v
            S = tl.load(final_ptr + at, mask=read & (keys < K), other=0.0).to(tl.float32)
        elif INITIAL:
            at = n * initial_n + h * initial_h + keys * initial_k + v[None, :] * initial_v
            S = tl.load(initial_ptr + at, mask=in_v & (keys < K), other=0.0).to(tl.float32)
        tl.store(S_at + k0 * V, S, mask=in_v)
    tl.debug_barrier()

    for c in range(lo, hi):
        work = (row + c) * HV + h
        tile = work * (64 * KP) + r[:, None] * KP + d[None, :]
        u_at = u_ptr + work * (64 * V) + v[None, :]
        vn = tl.load(u_at + r[:, None] * V, mask=in_v, other=0.0)
        o = tl.zeros((64, BV), tl.float32)
        for k0 in range(0, KP, BLOCK):
            S = tl.load(S_at + k0 * V, mask=in_v, other=0.0)
            vn -= _dot(tl.load(w_ptr + tile + k0), S)
            o += _dot(tl.load(qg_ptr + tile + k0), S)
        tl.debug_barrier()
        tl.store(u_at + r[:, None] * V, vn, mask=in_v)
        tl.debug_barrier()
        for r0 in range(0, 64, BLOCK):
            part = tl.load(u_at + (r0 + d)[:, None] * V, mask=in_v, other=0.0)
            o += _dot(tl.load(A_ptr + work * 4096 + r[:, None] * 64 + (r0 + d)[None, :]), part)
        t = start + c * 64 + r
        tl.store(
            o_ptr + ((b * T + t)[:, None] * HV + h) * V + v[None, :],
            o,
            mask=(t < end)[:, None] & in_v,
        )
        for k0 in range(0, KP, BLOCK):
            S = (
                tl.load(S_at + k0 * V, mask=in_v, other=0.0)
                * tl.load(decay_ptr + work * KP + k0 + d)[:, None]
            )
            kg_at = kg_ptr + work * (64 * KP) + (k0 + d)[:, None]
            for r0 in range(0, 64, BLOCK):
                part = tl.load(u_at + (r0 + d)[:, None] * V, mask=in_v, other=0.0)
                S += _dot(tl.load(kg_at + (r0 + d)[None, :] * KP), part)
            tl.debug_barrier()
            tl.store(S_at + k0 * V, S, mask=in_v)
        tl.debug_barrier()
    if FINAL:
        final_at = final_ptr + page * final_n + h * final_h + v[None, :] * final_v
        for k0 in range(0, KP, BLOCK):
            keys = (k0 + d)[:, None]
            S = tl.load(S_at + k0 * V, mask=in_v, other=0.0)
            tl.store(
                final_at + keys * final_k, S.to(final_ptr.dtype.element_ty), mask=in_v & (keys < K)
            )


class Batch(NamedTuple):
    """The sequences and chunks of a launch.

    Attributes:
        T: Tokens per batch row.
        N: Sequences.
        NC: Rows of the chunk table, or programs per batch row.
        programs: Of `prepare`.
        cu_seqlens: As given.
        chunks: As given.
        slab: First row and number of rows of the workspace's slab; None if it holds all.
    """

    T: int
    N: int
    NC: int
    programs: int
    cu_seqlens: Tensor | None
    chunks: Tensor | None
    slab: tuple[int, int] | None = None

    @staticmethod
    def of(q: Tensor, cu_seqlens: Tensor | None, chunks: Tensor | None) -> "Batch":
        B, T = q.shape[:2]
        if cu_seqlens is None:
            NC = T // CHUNK + 1
            return Batch(T, B, NC, B * NC, None, None)
        NC = chunks.shape[0]
        # T // 64 + N + 1 blocks of 64 rows cover the padding too
        return Batch(
            T, cu_seqlens.shape[0] - 1, NC, NC + 1, cu_seqlens.contiguous(), chunks.contiguous()
        )

    def slabs(self, q: Tensor, v: Tensor) -> list["Batch"]:
        """This batch in parts whose workspace is not too large.

        A compiled graph has a fixed number of launches: a symbolic number of rows counts as the one
        that it is compiled with, and as few where nothing is known of it.
        """
        rows = workspace_rows(q.shape[0] * self.T, self.N)
        try:
            known = hint(rows)
        except NoHintError:
            known = 0
        count = workspace_slabs(known, v.shape[2], q.shape[3], v.shape[3], q.dtype)
        if count == 1:
            return [self]
        size = (rows + count - 1) // count
        # see `slab_rows`; one more program for the padding that counts from behind the last row
        part = self._replace(programs=size + self.N + 1)
        return [part._replace(slab=(i * size, size)) for i in range(count)]

    @property
    def tables(self) -> tuple[Any, ...]:
        """What every `prepare` takes of it, in order."""
        return self.cu_seqlens, self.chunks, self.T, self.N, self.NC, *(self.slab or (0, 0))


class Workspace(NamedTuple):
    """What `prepare` writes and `scan` reads, in the order of their arguments, and the states that
    `scan` keeps in memory.

    `u` is None where the output is its place, `S` where states stay in registers.
    """

    w: Tensor
    u: Tensor | None
    kg: Tensor
    qg: Tensor
    A: Tensor
    decay: Tensor
    S: Tensor | None

    @property
    def tiles(self) -> tuple[Tensor | None, ...]:
        """What `prepare` takes of it."""
        return self[:6]


def make_workspace(q: Tensor, v: Tensor, batch: Batch) -> Workspace:
    """For a batch, or for any slab of one."""
    rows = workspace_rows(q.shape[0] * batch.T, batch.N) if batch.slab is None else batch.slab[1]
    HV, V = v.shape[2:]

    def make(first: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((first, HV, *shape), dtype=dtype, device=q.device)

    row = workspace_row(q.shape[3], V, q.dtype)
    tiles = {name: make(rows, *tile) for name, tile in row.items()}
    S = None
    if batch.slab is not None or q.dtype == torch.float32:
        S = make(at_least_one(batch.N), (row["w"][0][1], V), torch.float32)
    return Workspace(u=tiles.pop("u", None), S=S, **tiles)


def at_least_one(sequences: Any) -> Any:
    """No GPU launches an empty grid."""
    return torch.sym_max(sequences, 1)


def dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where their last stride is not 1 or an offset within a chunk does not fit
    32 bits.
    """
    tensors = tuple(x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return tuple(x if x.stride(1) < 1 << 25 else x.contiguous() for x in tensors)


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; 64 KB, which every GPU has, where it is not
    known.
    """
    if device.type != "cuda":
        return 64 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def scan_values(K: int, V: int, programs: Any, o: Tensor) -> dict[str, Any]:
    """What is chosen for `scan` by its number of (sequence, head) pairs: at most 16, 32, or more.

    BV, the state columns per program, is at most V.
    """
    if not isinstance(programs, int):
        programs = 64  # a symbolic number of sequences is a batch of them
    programs = 16 if programs <= 16 else 32 if programs <= 32 else 64
    chosen = choose("chunk_scan", o.device, K=K, V=V, programs=programs, dtype=o.dtype)
    return {**chosen, "BV": min(chosen["BV"], max(16, triton.next_power_of_2(V)))}


def stages(KP: int, BV: int, u_bytes: int, device: torch.device) -> int:
    """How many chunks' tiles `scan` has in shared memory at a time, 1 for no pipelining."""
    products = 2 * BV * (KP + CHUNK)  # S and vn as operands
    for depth in (3, 2):
        tiles = depth * 2 * CHUNK * (3 * KP + CHUNK)
        if tiles + (depth - 1) * (CHUNK * BV * u_bytes + 4 * KP) + products <= shared_memory(
            device
        ):
            return depth
    return 1


def launch_general_prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor,
    beta: Tensor,
    scale: float,
    o: Tensor,
    workspace: Workspace,
    batch: Batch,
) -> None:
    """`prepare` for any size and dtype, from normalised keys (in v's dtype or fp32), the cumulative
    gate in log2 and beta after its sigmoid.
    """
    H, K = q.shape[2:]
    HV, V = v.shape[2:]
    wide = v.dtype == torch.float32
    traceable(chunk_prepare_general_kernel)[(batch.programs, HV)](
        q,
        k,
        v,
        G,
        beta,
        o,
        *workspace.tiles,
        *batch.tables,
        *(stride for x in (q, k, v, G, beta) for stride in x.stride()[:3]),
        SCALE=scale,
        H=H,
        HV=HV,
        K=K,
        V=V,
        VARLEN=batch.cu_seqlens is not None,
        SLABS=batch.slab is not None,
        KP=workspace.w.shape[3],
        VP=triton.next_power_of_2(V),
        BLOCK=16,
        FP32=wide,
        # 16-bit: with 4 warps Triton 3.6 makes warp-group products of these loops and reads
        # outside shared memory on sm_90; 2 warps keep it at the older instruction
        num_warps=4 if wide else 2,
        num_stages=1,
    )


def launch_scan(
    o: Tensor,
    workspace: Workspace,
    batch: Batch,
    K: int,
    initial: Tensor | None,
    final: Tensor | None,
    indices: Tensor | None,
    has_initial: Tensor | None,
) -> None:
    """Writes the output to `o` and the final states to `final`.

    With `indices`, the sequences' pages, `final` also holds the initial states.
    """
    HV, V = o.shape[2:]
    KP = workspace.w.shape[3]
    indices, has_initial = (None if x is None else x.contiguous() for x in (indices, has_initial))
    sizes: dict[str, Any] = {
        "HV": HV,
        "K": K,
        "V": V,
        "KP": KP,
        "VARLEN": batch.cu_seqlens is not None,
        "SLABS": batch.slab is not None,
        "INITIAL": initial is not None,
        "FINAL": final is not None,
        "PAGED": indices is not None,
        "HAS_INITIAL": has_initial is not None,
    }
    slots = 0 if final is None else final.shape[0]
    slab = batch.slab or (0, 0)
    sequences = (batch.cu_seqlens, batch.T, batch.N, *slab)
    states = (initial, final, indices, has_initial, *sequences, slots)
    strides = [
        stride for x in (initial, final) for stride in ((0,) * 4 if x is None else x.stride())
    ]
    pairs = HV * at_least_one(batch.N)
    if o.dtype == torch.float32:
        chosen = choose("chunk_scan_fp32", o.device)
        traceable(chunk_scan_fp32_kernel)[(triton.cdiv(V, chosen["BV"]) * pairs,)](
            *workspace, o, *states, *strides, **sizes, **chosen
        )
    else:
        chosen = scan_values(K, V, batch.N * HV, o)
        u = o if workspace.u is None else workspace.u
        depth = stages(KP, chosen["BV"], u.element_size(), o.device)
        traceable(chunk_scan_kernel)[(triton.cdiv(V, chosen["BV"]) * pairs,)](
            *workspace,
            o,
            *states,
            *strides,
            **sizes,
            HALF=o.dtype == torch.float16,
            **{**chosen, "STAGES": min(chosen["STAGES"], depth)},
        )
