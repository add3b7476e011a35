"""The short convolution of whole sequences as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.device.kernel import conv_row, conv_taps

# A thread owns 8 channels (16 bytes of bf16) and walks down the tokens, STEP_T rows in flight at a
# time, the last W - 1 of them kept in registers.
CONFIG = {"STEP_T": 8, "BLOCK_D": 256, "num_warps": 1}
# A program takes up to MAX_STEPS steps, fewer where there would not be PROGRAMS of them.
MAX_STEPS = 2
PROGRAMS = 4096


@triton.jit
def short_conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    has_initial_ptr,
    cu_seqlens_ptr,
    T,
    D,
    N,
    num_slots,
    block_t,
    blocks_per_sequence,
    stride_x_batch,
    stride_x_row,
    stride_state_slot,
    stride_state_row,
    stride_state_dim,
    stride_slots,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program computes block_t tokens of one sequence x BLOCK_D channels.

    Grid: token blocks x D blocks, D fastest, on the one axis that has no limit of 65535. In a dense
    batch every sequence has `blocks_per_sequence` token blocks. With `cu_seqlens`, sequence n owns
    those from `cu_seqlens[n] // block_t + n` on, which are always enough and are found by
    bisection; the rows past the last sequence are sequence N, which is skipped.

    The program of a sequence's first tokens reads the history and also writes the new state,
    straight from the end of x, so that no other program ever touches the slot.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < D
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
        start = tl.maximum(pid - (offset // block_t + n), 0) * block_t  # token of the sequence
        x_ptr += first_row * stride_x_row
        active = n < N
    else:
        n = pid // blocks_per_sequence
        first_row = n * T
        length = first_row * 0 + T
        start = (pid - n * blocks_per_sequence) * block_t
        x_ptr += n * stride_x_batch
        active = n >= 0
    if start >= tl.maximum(length, 1):
        return
    stop = tl.minimum(start + block_t, length)
    y_ptr += first_row * D
    if HAS_STATE:
        slot = tl.load(slots_ptr + n * stride_slots, mask=active, other=0).to(tl.int64)
        active = (slot > 0) & (slot < num_slots)
        state_ptr += slot * stride_state_slot
    if (VARLEN or HAS_STATE) and active == 0:
        for i in range(start, stop):
            tl.store(y_ptr + i * D + d, tl.zeros([BLOCK_D], y_ptr.dtype.element_ty), mask=ok)
        return

    taps = conv_taps(weight_ptr, d, D, W, BLOCK_W)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    state_rows = state_ptr
    if HAS_STATE:
        state_rows = state_ptr + d.to(tl.int64) * stride_state_dim

    mixed: tl.constexpr = HAS_INITIAL and state_ptr.dtype.element_ty != x_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float32 if mixed else x_ptr.dtype.element_ty
    window = ()  # the W - 1 rows before the next token, [BLOCK_D] each
    for past in tl.static_range(W - 1):
        i = start + past - (W - 1)
        row = tl.load(x_ptr + i * stride_x_row + d, mask=ok & (i >= 0), other=0.0).to(wide)
        if HAS_INITIAL:
            known = (start == 0) & (tl.load(has_initial_ptr + n).to(tl.int32) != 0)
            old = tl.load(state_rows + past * stride_state_row, mask=ok & known, other=0.0)
            row = tl.where(start == 0, old.to(wide), row)
        window += (row,)

    if HAS_STATE and start == 0:
        tl.debug_barrier()  # a row is not always written by the thread that read it
        for keep in tl.static_range(W - 1):
            i = length + keep - (W - 1)
            new = tl.load(x_ptr + i * stride_x_row + d, mask=ok & (i >= 0), other=0.0).to(wide)
            for past in tl.static_range(W - 1):
                new = tl.where(i == past - (W - 1), window[past], new)
            new = new.to(state_ptr.dtype.element_ty)
            tl.store(state_rows + keep * stride_state_row, new, mask=ok)

    for t in range(start, stop, STEP_T):
        rows = window
        for step in tl.static_range(STEP_T):
            token_ptr = x_ptr + (t + step) * stride_x_row + d
            token = tl.load(token_ptr, mask=ok & (t + step < stop), other=0.0)
            rows += (token.to(wide),)
        for step in tl.static_range(STEP_T):
            y = conv_row(rows, step, taps, bias, W, SILU)
            y_row = y_ptr + (t + step) * D + d
            tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=ok & (t + step < stop))
        window = rows[STEP_T:]


def launch_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return _launch(x, weight, bias, activation, None, None, None, cu_seqlens, "SD")


def launch_short_conv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    slots: Tensor, has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> Tensor:  # fmt: skip
    return _launch(
        x, weight, bias, activation, conv_state, slots, has_initial_state, cu_seqlens, layout
    )


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor |
    None, slots: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout:
    str,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    T, D = x.shape[-2:]
    W = int(weight.shape[1])
    batch, stride_batch = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    d_blocks = triton.cdiv(D, CONFIG["BLOCK_D"])
    steps = batch * T * d_blocks // (PROGRAMS * CONFIG["STEP_T"])
    block_t = torch.sym_max(1, torch.sym_min(steps, MAX_STEPS)) * CONFIG["STEP_T"]
    blocks_per_sequence = torch.sym_max(1, triton.cdiv(T, block_t))
    if cu_seqlens is None:
        N, blocks = batch, batch * blocks_per_sequence
    else:
        N = cu_seqlens.shape[0] - 1
        blocks = T // block_t + N + 1
    num_slots, stride_slot, stride_row, stride_dim = 0, 0, 0, 0
    if conv_state is not None:
        num_slots, stride_slot = conv_state.shape[0], conv_state.stride(0)
        stride_row, stride_dim = (
            conv_state.stride()[1:] if layout == "SD" else conv_state.stride()[:0:-1]
        )
    traceable(short_conv_kernel)[(d_blocks * blocks,)](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        conv_state,
        slots,
        None if has_initial_state is None else has_initial_state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        T,
        D,
        N,
        num_slots,
        block_t,
        blocks_per_sequence,
        stride_batch,
        x.stride(-2),
        stride_slot,
        stride_row,
        stride_dim,
        0 if slots is None else slots.stride(0),
        W=W,
        BLOCK_W=triton.next_power_of_2(W),
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_STATE=conv_state is not None,
        HAS_INITIAL=has_initial_state is not None,
        VARLEN=cu_seqlens is not None,
        **CONFIG,
    )
    return y
