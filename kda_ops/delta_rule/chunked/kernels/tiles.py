"""Shared by the kernels of chunked KDA, of which one operator takes the cumulative gate and another
the raw one.

Two kernels each: `prepare`, for tiles that fit one program (`prepare.py`) or in general form
(`prepare_general.py`), and `scan` (`scan.py`), for few heads after its own first pass
(`scan_segments.py`), with a workspace between them (`workspace.py`). This file has how a program
finds its chunk or sequence and its state, how it walks a sequence's chunks, and what both forms of
`prepare` share.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_rows(cu_ptr, n, T, N, VARLEN: tl.constexpr):
    """Batch row, first token, end and workspace row of sequence n; in bounds for any offsets."""
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
def chunk_rows(p, chunk_indices_ptr, cu_ptr, T, N, NC, VARLEN: tl.constexpr):
    """Batch row, first token, token count (0: nothing to do) and workspace row of program p's
    chunk.

    With `cu_seqlens` NC is the number of rows of the chunk table, any of which may be invalid;
    without, NC programs per batch row are launched.
    """
    if VARLEN:
        listed = p < NC
        n = tl.load(chunk_indices_ptr + 2 * p, mask=listed, other=-1).to(tl.int64)
        c = tl.load(chunk_indices_ptr + 2 * p + 1, mask=listed, other=-1).to(tl.int64)
        real = (n >= 0) & (n < N) & (c >= 0)
        n = tl.where(real, n, 0)
        c = tl.where(real, c, T // 64 + 1)
    else:
        n = p // NC
        c = p % NC
    b, start, end, row = sequence_rows(cu_ptr, n, T, N, VARLEN)
    first = start + c * 64
    count = tl.maximum(tl.minimum(end - first, 64), 0).to(tl.int32)
    return b, first, count, row + c


@triton.jit
def slab_rows(
    p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows,
    VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """`chunk_rows` in a slab of the workspace, with p, and whether the chunk is in the slab.

    Program p's row is between p and p + N, so a slab's chunks are those of `rows + N` programs. One
    sequence, where N is a constant, is simpler: its rows are its chunks. Counting in 32 bits saves
    registers, of which `prepare` is short.
    """
    if SLABS and not VARLEN and N == 1:
        c = p.to(tl.int32)
        first = (first_row + c).to(tl.int64) * 64
        count = tl.maximum(tl.minimum(T - first, 64), 0).to(tl.int32)
        return p, p * 0, first, count, c.to(tl.int64), (count > 0) & (c < rows)
    if SLABS:
        p += tl.maximum(first_row - N, 0)
    b, first, count, row = chunk_rows(p, chunk_indices_ptr, cu_ptr, T, N, NC, VARLEN)
    inside = count > 0
    if SLABS:
        if not VARLEN:
            inside = inside & (b < N)  # there are more programs than chunks
        row -= first_row
        inside = inside & (row >= 0) & (row < rows)
    return p, b, first, count, row, inside


@triton.jit
def slab_chunks(row, chunks, first_row, rows):
    """From a sequence's first workspace row: its first row in this slab, its chunks lo to hi there,
    and whether it begins there; hi < lo if it has no chunk there.

    An empty sequence counts as one row. The final state of a slab is overwritten by the sequence's
    next slab.
    """
    row -= first_row
    used = tl.maximum(chunks, 1)
    lo = tl.maximum(-row, 0).to(tl.int32)
    hi = tl.minimum(chunks, rows - row).to(tl.int32)
    hi = tl.where((row < rows) & (row + used > 0), hi, lo - 1)
    return row, lo, hi, row >= 0


@triton.jit
def sequence_part(
    n, cu_ptr, T, N, first_row, rows, VARLEN: tl.constexpr, SLABS: tl.constexpr
):  # fmt: skip
    """Batch row, first token, end and first workspace row of sequence n, its chunks lo to hi in the
    slab (hi < lo if there are none), and whether it begins and ends there.
    """
    b, start, end, row = sequence_rows(cu_ptr, n, T, N, VARLEN)
    chunks = tl.cdiv(end - start, 64).to(tl.int32)
    lo = 0
    hi = chunks
    begins = True
    if SLABS:
        row, lo, hi, begins = slab_chunks(row, hi, first_row, rows)
    return b, start, end, row, lo, hi, begins, hi == chunks


@triton.jit
def rounds(hi):
    """The end of a scan, times a 1 that the compiler does not know. Of one token, where T is a
    constant, it would make no loop, and ptxas 12.8 reads anything in what is left
    (`perf/notes/backward.md`).
    """
    return hi * tl.num_programs(2)


@triton.jit
def page_of(indices_ptr, n, slots, PAGED: tl.constexpr):
    """The state's page of sequence n, and whether it is valid (slot 0 and slots out of range are
    not). Without slots it is page n.
    """
    if PAGED:
        if indices_ptr is None:
            page = n
            live = n < slots
        else:
            page = tl.load(indices_ptr + n).to(tl.int64)
            live = (page > 0) & (page < slots)
            page = tl.where(live, page, 0)
    else:
        page = n
        live = n >= 0
    return page, live


@triton.jit
def place_of(strides, n, h, d, v):
    """Offsets of the part [d, v] of a state [n, h, v, k]."""
    stride_n, stride_h, stride_v, stride_k = strides
    return n * stride_n + h * stride_h + d[:, None] * stride_k + v[None, :] * stride_v


@triton.jit
def first_state(
    states, carried, n, page, h, d, v, begins,
    K: tl.constexpr, V: tl.constexpr, SLABS: tl.constexpr, INITIAL: tl.constexpr,
    PAGED: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """A head's state [d, v] in fp32 before a sequence's first chunk: from its page, the initial
    states, or `carried` from the last slab; else zero.

    `states`: initial states, their strides, final states or pages, their strides, which sequences
    have an initial state.
    """
    initial_ptr, initial, final_ptr, final, has_initial_ptr = states
    read = (d < K)[:, None] & (v < V)[None, :]
    if SLABS:
        read = read & begins
    S = tl.zeros((d.shape[0], v.shape[0]), tl.float32)
    if PAGED:
        if HAS_INITIAL:
            read = read & (tl.load(has_initial_ptr + n) != 0)
        S = tl.load(final_ptr + place_of(final, page, h, d, v), mask=read, other=0.0)
        S = S.to(tl.float32)
    elif INITIAL:
        at = place_of(initial, n, h, d, v)
        S = tl.load(initial_ptr + at, mask=read, other=0.0).to(tl.float32)
    if SLABS:
        S += tl.load(carried, mask=(v < V)[None, :] & (begins == 0), other=0.0)
    return S


@triton.jit
def scan_chunks(
    memory, S, place, lo, hi, v, boundaries,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr, OUTPUT: tl.constexpr,
    VALUES: tl.constexpr = True,
):  # fmt: skip
    """Columns v of a head's state after chunks lo to hi of one sequence, starting from S [KP, v].

    With OUTPUT the output's columns are written, and with BLOCK_TOKENS the states at the ends of
    blocks; without, v may be past V, where u is zero. Without VALUES all u is zero. `memory`: the
    workspace (None for u if it is in the output) and the output. `place`: the head, the output's
    row of the sequence's first token, its tokens, its first workspace row. `boundaries`: see
    `boundaries_of`.
    """
    tiles_ptr, u_ptr, decay_ptr, o_ptr = memory
    h, first, length, row = place
    r = tl.arange(0, 64)
    d = tl.arange(0, KP)
    step = tl.full((), HV, tl.int64)
    ROW: tl.constexpr = 64 * (3 * KP + 64)  # of `tiles_of`
    work = row * HV + h
    w_ptr, kg_ptr, qg_ptr, A_ptr = tiles_of(tiles_ptr, work, KP)
    tile = r[:, None] * KP + d[None, :]
    w_at = w_ptr + tile
    kg_at = kg_ptr + tile
    qg_at = qg_ptr + tile
    if u_ptr is not None:
        u_at = u_ptr + work * (64 * V) + r[:, None] * V + v[None, :]
    A_at = A_ptr + r[:, None] * 64 + r[None, :]
    decay_at = decay_ptr + work * KP + d
    o_at = o_ptr + ((first + r)[:, None] * HV + h) * V + v[None, :]
    in_v = (v < V)[None, :]
    for c in tl.range(lo, rounds(hi), num_stages=STAGES):
        ok = (r < length - c * 64)[:, None] & in_v
        if OUTPUT and BLOCK_TOKENS > 0:  # at once: a load takes as long as the products below
            block = boundary_page(boundaries, c, BLOCK_TOKENS)
        w = tl.load(w_at + c * step * ROW)
        if not VALUES:
            u = tl.zeros((64, v.shape[0]), tl.float32)
        elif u_ptr is None:
            u = tl.load(o_at + c * step * (64 * V), mask=ok, other=0.0)
        else:
            u = tl.load(u_at + c * step * (64 * V), mask=in_v, other=0.0)
        kg = tl.load(kg_at + c * step * ROW)
        if OUTPUT:
            qg = tl.load(qg_at + c * step * ROW)
            A = tl.load(A_at + c * step * ROW)
        decay = tl.load(decay_at + c * step * KP)
        if HALF:
            Sh, S_scale = to_half(S)
            vn, vn_scale = to_half(u.to(tl.float32) - tl.dot(w, Sh) * S_scale)
            if OUTPUT:
                o = tl.dot(qg, Sh) * S_scale + tl.dot(A, vn) * vn_scale
            S = S * decay[:, None] + tl.dot(tl.trans(kg), vn) * vn_scale
        else:
            Sh = S.to(w.dtype)
            vn = (u.to(tl.float32) - tl.dot(w, Sh)).to(w.dtype)
            if OUTPUT:
                o = tl.dot(qg, Sh)
            S = tl.dot(tl.trans(kg), vn, S * decay[:, None])
            if OUTPUT:
                o = tl.dot(A, vn, o)
        if OUTPUT:
            tl.store(o_at + c * step * (64 * V), o.to(o_ptr.dtype.element_ty), mask=ok)
            if BLOCK_TOKENS > 0:
                ends = at_boundary(boundaries, c, length, BLOCK_TOKENS)
                if ends:
                    store_boundary(boundaries, block, S, h, d, v, K, V)
    return S


@triton.jit
def boundaries_of(blocks_ptr, contexts_ptr, columns, pages_ptr, strides, slots, n):
    """Where the states of sequence n at the ends of its blocks go: its tokens before this call, its
    row of the table and its columns, the pages, their strides and number.
    """
    before = n * 0
    if contexts_ptr is not None:
        before = tl.load(contexts_ptr + n).to(tl.int64)
    return before, blocks_ptr + n * columns, columns, pages_ptr, strides, slots


@triton.jit
def at_boundary(boundaries, c, length, BLOCK_TOKENS: tl.constexpr):
    """Whether a block ends with chunk c of a sequence, which has `length` tokens here."""
    end = (c + 1) * 64
    return ((boundaries[0] + end) % BLOCK_TOKENS == 0) & (end <= length)


@triton.jit
def boundary_page(boundaries, c, BLOCK_TOKENS: tl.constexpr):
    """The page of the block that ends with chunk c, and whether it is valid, as in `page_of`."""
    before, table_ptr, columns, _, _, slots = boundaries
    column = (before + (c + 1) * 64) // BLOCK_TOKENS - 1
    listed = (column >= 0) & (column < columns)
    page = tl.load(table_ptr + column, mask=listed, other=0).to(tl.int64)
    live = (page > 0) & (page < slots)
    return tl.where(live, page, 0), live


@triton.jit
def store_boundary(boundaries, block, S, h, d, v, K: tl.constexpr, V: tl.constexpr):
    """Writes a head's state [d, v] to the page of the block that ends, see `boundary_page`."""
    _, _, _, pages_ptr, strides, _ = boundaries
    page, live = block
    store_state(pages_ptr, strides, None, S, live, page, h, d, v, K, V, True, False)


@triton.jit
def store_state(
    final_ptr, final, carried, S, stored, page, h, d, v,
    K: tl.constexpr, V: tl.constexpr, FINAL: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Where `stored`, writes a head's state [d, v] after a sequence's last chunk in this slab."""
    in_state = (v < V)[None, :] & stored
    if FINAL:
        at = place_of(final, page, h, d, v)
        in_final = (d < K)[:, None] & in_state
        tl.store(final_ptr + at, S.to(final_ptr.dtype.element_ty), mask=in_final)
    if SLABS:
        tl.store(carried, S, mask=in_state)


@triton.jit
def clear_sequence(o_ptr, b, start, end, h, T, v, HV: tl.constexpr, V: tl.constexpr):
    """Zeroes the output columns v of one sequence and head."""
    t = start + tl.arange(0, 64)
    zero = tl.zeros((64, v.shape[0]), tl.float32).to(o_ptr.dtype.element_ty)
    for c in range(0, tl.cdiv(end - start, 64)):
        tc = t + c * 64
        at = ((b * T + tc)[:, None] * HV + h) * V + v[None, :]
        tl.store(o_ptr + at, zero, mask=(tc < end)[:, None] & (v < V)[None, :])


@triton.jit
def clear_padding(
    o_ptr, cu_ptr, p, h, T, N, NC, HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr
):
    """Zeroes 64 of the rows past the last sequence, counted from the end of the tokens.

    For programs without a chunk. They are the last of the NC + 1, and they suffice: there are at
    most `end // 64 + N` chunks.
    """
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + N).to(tl.int64), 0), T)
    t = T - (NC + 1 - p) * 64 + tl.arange(0, 64)
    d = tl.arange(0, VP)
    zero = tl.zeros((64, VP), tl.float32).to(o_ptr.dtype.element_ty)
    ok = ((t >= end) & (t < T))[:, None] & (d < V)[None, :]
    tl.store(o_ptr + (t[:, None] * HV + h) * V + d[None, :], zero, mask=ok)


@triton.jit
def meets(i, j, s):
    """Whether rows i and columns j meet at level s."""
    return (i // (2 * s) == j // (2 * s)) & ((i // s) % 2 == 1) & ((j // s) % 2 == 0)


@triton.jit
def tiles_of(tiles_ptr, work, KP: tl.constexpr):
    """Pointers to w, kg, qg [64, KP] and Aqk [64, 64] of a chunk, contiguous in its row."""
    w_ptr = tiles_ptr + work * (64 * (3 * KP + 64))
    return w_ptr, w_ptr + 64 * KP, w_ptr + 128 * KP, w_ptr + 192 * KP


@triton.jit
def store_u(
    u_ptr, o_ptr, u, work, token, count, h,
    HV: tl.constexpr, V: tl.constexpr, v0,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes columns v0 to v0 + BLOCK of a chunk's u to its workspace row, or without one to the
    output's `count` rows from `token` on.
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
def to_half(x):
    """X in fp16 with every column scaled to at most 1, and the columns' scales."""
    m = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)[None, :]
    return (x * (1.0 / m)).to(tl.float16), m


@triton.jit
def full_dot(a, b):
    """A GEMM whose fp32 operands keep all their bits."""
    return tl.dot(a, b, input_precision="ieee")
