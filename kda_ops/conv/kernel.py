"""Triton functions of the short convolution."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kda_ops.kernel import quick_sigmoid


@triton.jit
def conv_taps(weight_ptr, d, D, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The W taps of the channels `d` as a tuple of fp32 vectors, from a contiguous weight [D, W].

    Loaded as one tile and transposed in registers: a load per tap would touch each cache line W
    times.
    """
    w = tl.arange(0, BLOCK_W)
    tile = tl.load(
        weight_ptr + d[:, None] * W + w[None, :],
        mask=(d < D)[:, None] & (w < W)[None, :],
        other=0.0,
    )
    tile = tile.to(tl.float32)  # [BLOCK_D, BLOCK_W]
    taps = ()
    for i in tl.static_range(W):
        taps += (tl.sum(tl.where(w[None, :] == i, tile, 0.0), axis=1),)
    return taps


@triton.jit
def conv_row(rows, i: tl.constexpr, taps, bias, W: tl.constexpr, SILU: tl.constexpr):
    """One output row of the convolution, from rows i .. i + W - 1."""
    y = bias
    for tap in tl.static_range(W):
        y += rows[i + tap].to(tl.float32) * taps[tap]
    if SILU:
        y = y * quick_sigmoid(y)
    return y


@triton.jit
def rows_at(ptr, stride, count, ok, ROWS: tl.constexpr):
    """The first `count` of ROWS rows as a tuple of vectors, then zeros."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows += (tl.load(ptr + i * stride, mask=ok & (i < count), other=0.0),)
    return rows


@triton.jit
def convolved(rows, tokens, taps, bias, W: tl.constexpr, TOKENS: tl.constexpr, SILU: tl.constexpr):
    """The outputs of `tokens` of TOKENS tokens as a tuple of fp32 vectors, then zeros."""
    outputs = ()
    for i in tl.static_range(TOKENS):
        y = conv_row(rows, i, taps, bias, W, SILU)
        outputs += (tl.where(i < tokens, y, 0.0),)
    return outputs


@triton.jit
def shift_history(ptr, stride, rows, tokens, ok, W: tl.constexpr, TOKENS: tl.constexpr):
    """Writes `concat(history[1:], x_0 .. x_{tokens-1})`; without tokens, nothing."""
    ok &= tokens > 0
    for keep in tl.static_range(W - 2 + TOKENS):
        new = rows[keep + 1].to(ptr.dtype.element_ty)
        tl.store(ptr + keep * stride, new, mask=ok & (keep < W - 2 + tokens))


@triton.jit
def unit_heads(y, ok, normed, EPS: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """`y / sqrt(sum(y^2) + EPS)` over each of the HEADS equal parts of y, or y if not `normed`.

    With PADDED, a part ends in channels that are not `ok` and are ignored.
    """
    heads = tl.where(ok, y, 0.0) if PADDED else y
    heads = heads.reshape(HEADS, y.shape[0] // HEADS)
    factor = tl.rsqrt(tl.sum(heads * heads, axis=1) + EPS)
    factor = tl.where(normed, factor, 1.0)
    return (heads * factor[:, None]).reshape(y.shape[0])


@triton.jit
def token_block(cu_seqlens_ptr, pid, T, N, block_t, blocks_per_sequence, VARLEN: tl.constexpr):
    """Token block `pid` (int64): its sequence n, the row of that sequence's first token and its
    length, the block's first token in the sequence, and whether it is a sequence.

    In a dense batch every sequence has `blocks_per_sequence` token blocks. With `cu_seqlens`,
    sequence n owns the blocks from `cu_seqlens[n] // block_t + n` on, which are always enough and
    are found by bisection; the rows past the last sequence are sequence N, which is none.
    """
    if VARLEN:
        n = tl.zeros((), tl.int64)
        high = n + N
        while n < high:
            middle = (n + high + 1) // 2
            fits = tl.load(cu_seqlens_ptr + middle).to(tl.int64) // block_t + middle <= pid
            n = tl.where(fits, middle, n)
            high = tl.where(fits, high, middle - 1)
        offset = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        first_row = tl.minimum(tl.maximum(offset, 0), T)
        end = tl.load(cu_seqlens_ptr + n + 1, mask=n < N, other=T).to(tl.int64)
        length = tl.minimum(tl.maximum(end, first_row), T) - first_row
        start = tl.maximum(pid - (offset // block_t + n), 0) * block_t
        active = n < N
    else:
        n = pid // blocks_per_sequence
        first_row = n * T
        length = first_row * 0 + T
        start = (pid - n * blocks_per_sequence) * block_t
        active = n >= 0
    return n, first_row, length, start, active


@triton.jit
def conv_sequence(
    x_ptr, weight_ptr, bias_ptr, y_ptr, state_ptr, slots_ptr, has_initial_ptr, cu_seqlens_ptr,
    blocks, pid, c, ok, normed, T, N, num_slots,
    block_t, blocks_per_sequence,
    stride_x_batch, stride_x_row,
    width, stride_state_slot, stride_state_row, stride_state_dim, stride_slots,
    W: tl.constexpr, BLOCK_W: tl.constexpr, STEP_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    VARLEN: tl.constexpr, BLOCK_TOKENS: tl.constexpr, EPS: tl.constexpr, HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Convolves block_t tokens of one sequence, from the BLOCK_D channels `c` of x, where `ok`, to
    those of y, which is dense with `width` channels. All pointers are to channel 0. HEADS is 0 for
    no norm; else each row gets `unit_heads` where `normed`.

    The token block is `pid` (int64), see `token_block`; rows past the last sequence are skipped.

    The program of a sequence's first tokens reads the history and also writes the new state,
    directly from the end of x, so that no other program touches the slot. With BLOCK_TOKENS the
    program of the last token of a block writes the rows before its end to the block's page;
    `blocks`: their table, its columns, the tokens before each sequence.
    """
    n, first_row, length, start, active = token_block(
        cu_seqlens_ptr, pid, T, N, block_t, blocks_per_sequence, VARLEN
    )
    x_ptr += first_row * stride_x_row if VARLEN else n * stride_x_batch
    if start >= tl.maximum(length, 1):
        return
    stop = tl.minimum(start + block_t, length)
    y_ptr += first_row * width
    pages_ptr = state_ptr
    if HAS_STATE:
        if slots_ptr is None:  # sequence n is on page n
            slot = n
            active = active & (n < num_slots)
        else:
            slot = tl.load(slots_ptr + n * stride_slots, mask=active, other=0).to(tl.int64)
            active = (slot > 0) & (slot < num_slots)
        state_ptr += slot * stride_state_slot
    if (VARLEN or HAS_STATE) and active == 0:
        for i in range(start, stop):
            tl.store(y_ptr + i * width + c, tl.zeros([BLOCK_D], y_ptr.dtype.element_ty), mask=ok)
        return

    taps = conv_taps(weight_ptr, c, width, W, BLOCK_W)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    state_rows = state_ptr
    if HAS_STATE:
        state_rows = state_ptr + c.to(tl.int64) * stride_state_dim

    mixed: tl.constexpr = HAS_INITIAL and state_ptr.dtype.element_ty != x_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float32 if mixed else x_ptr.dtype.element_ty
    window = ()  # the W - 1 rows before the next token, [BLOCK_D] each
    for past in tl.static_range(W - 1):
        i = start + past - (W - 1)
        row = tl.load(x_ptr + i * stride_x_row + c, mask=ok & (i >= 0), other=0.0).to(wide)
        if HAS_INITIAL:
            known = (start == 0) & (tl.load(has_initial_ptr + n).to(tl.int32) != 0)
            old = tl.load(state_rows + past * stride_state_row, mask=ok & known, other=0.0)
            row = tl.where(start == 0, old.to(wide), row)
        window += (row,)

    if HAS_STATE and start == 0:
        tl.debug_barrier()  # a row may be written by another thread than read it
        for keep in tl.static_range(W - 1):
            i = length + keep - (W - 1)
            new = tl.load(x_ptr + i * stride_x_row + c, mask=ok & (i >= 0), other=0.0).to(wide)
            for past in tl.static_range(W - 1):
                new = tl.where(i == past - (W - 1), window[past], new)
            new = new.to(state_ptr.dtype.element_ty)
            tl.store(state_rows + keep * stride_state_row, new, mask=ok)

    if BLOCK_TOKENS > 0:
        blocks_ptr, columns, contexts_ptr = blocks
        before = n * 0
        if contexts_ptr is not None:
            before = tl.load(contexts_ptr + n).to(tl.int64)
        first = start + BLOCK_TOKENS - (before + start) % BLOCK_TOKENS
        for end in range(first, stop + 1, BLOCK_TOKENS):
            column = (before + end) // BLOCK_TOKENS - 1
            # as for recurrent states, which are known at the ends of chunks
            listed = (before % 64 == 0) & (column >= 0) & (column < columns)
            page = tl.load(blocks_ptr + n * columns + column, mask=listed, other=0).to(tl.int64)
            to = ok & (page > 0) & (page < num_slots)
            page_rows = pages_ptr + page * stride_state_slot + c.to(tl.int64) * stride_state_dim
            for keep in tl.static_range(W - 1):
                i = end + keep - (W - 1)
                new = tl.load(x_ptr + i * stride_x_row + c, mask=to & (i >= 0), other=0.0)
                new = new.to(state_ptr.dtype.element_ty)
                tl.store(page_rows + keep * stride_state_row, new, mask=to)

    for t in range(start, stop, STEP_T):
        rows = window
        for step in tl.static_range(STEP_T):
            token_ptr = x_ptr + (t + step) * stride_x_row + c
            token = tl.load(token_ptr, mask=ok & (t + step < stop), other=0.0)
            rows += (token.to(wide),)
        for step in tl.static_range(STEP_T):
            y = conv_row(rows, step, taps, bias, W, SILU)
            if HEADS > 0:
                y = unit_heads(y, ok, normed, EPS, HEADS, PADDED)
            y_row = y_ptr + (t + step) * width + c
            tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=ok & (t + step < stop))
        window = rows[STEP_T:]


def conv_blocks(
    batch: Any, T: Any, cu_seqlens: Any, d_blocks: Any, step_t: int, max_steps: int, programs: int
) -> tuple[Any, Any, Any, Any]:
    """The token blocks of `conv_sequence`: tokens per block, blocks per sequence of a dense batch,
    sequences, total blocks.

    A block is up to max_steps steps, fewer if there would be too few programs.
    """
    steps = batch * T * d_blocks // (programs * step_t)
    block_t = torch.sym_max(1, torch.sym_min(steps, max_steps)) * step_t
    blocks_per_sequence = torch.sym_max(1, triton.cdiv(T, block_t))
    if cu_seqlens is None:
        return block_t, blocks_per_sequence, batch, batch * blocks_per_sequence
    N = cu_seqlens.shape[0] - 1
    return block_t, blocks_per_sequence, N, T // block_t + N + 1


def conv_state_strides(conv_state: Any, layout: str) -> tuple[Any, Any, Any]:
    """Strides of a convolution state for slots, rows and channels; zeros for None."""
    if conv_state is None:
        return 0, 0, 0
    stride_slot, *strides = conv_state.stride()
    stride_row, stride_dim = strides if layout == "SD" else strides[::-1]
    return stride_slot, stride_row, stride_dim


@triton.jit
def of_part(part, q, k, v):
    """q, k or v for part 0, 1 or 2."""
    return tl.where(part == 0, q, tl.where(part == 1, k, v))


def three(items: Sequence[Any], missing: Any) -> tuple[Any, ...]:
    """One or three items, padded to three with `missing`."""
    return (*items, *[missing] * (3 - len(items)))
