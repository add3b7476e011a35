"""The short convolution of new tokens against its state as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.conv.kernel import conv_row, conv_state_strides, conv_taps
from kda_ops.tuning import choose


@triton.jit
def short_conv_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, slots_ptr, num_accepted_ptr, cu_seqlens_ptr,
    T, D, N, num_slots, L,
    stride_x_sequence, stride_x_row, stride_state_slot, stride_state_row, stride_state_dim,
    stride_slots,
    W: tl.constexpr, BLOCK_W: tl.constexpr, MAX_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ACCEPTED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program computes all tokens of one sequence x BLOCK_D channels.

    Grid: sequences x D blocks, D fastest, on the only axis without a limit of 65535.

    A program reads the whole window before writing any of it, and no other program touches these
    rows and channels, so shifting in place is safe. With `cu_seqlens` there is one more sequence,
    the rows past the last one, which is skipped. MAX_TOKENS is the most tokens that fit a state of
    L rows.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < D
    if VARLEN:
        offset = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        first_row = tl.minimum(tl.maximum(offset, 0), T)
        end = tl.load(cu_seqlens_ptr + n + 1, mask=n < N, other=T).to(tl.int64)
        length = tl.minimum(tl.maximum(end, first_row), T) - first_row
        x_ptr += first_row * stride_x_row
    else:
        first_row = n * MAX_TOKENS
        length = n * 0 + MAX_TOKENS
        x_ptr += n * stride_x_sequence
    if slots_ptr is None:  # sequence n is on page n
        slot = n
        active = (n < N) & (n < num_slots)
    else:
        slot = tl.load(slots_ptr + n * stride_slots, mask=n < N, other=0).to(tl.int64)
        active = (slot > 0) & (slot < num_slots)
    tokens = tl.where(active, tl.minimum(length, MAX_TOKENS), 0)
    y_ptr += first_row * D
    for i in range(tokens, length):
        tl.store(y_ptr + i * D + d, tl.zeros([BLOCK_D], y_ptr.dtype.element_ty), mask=ok)
    if tokens == 0:
        return

    first = tokens * 0
    if HAS_ACCEPTED:
        first = tl.load(num_accepted_ptr + n).to(tl.int64) - 1
        first = tl.minimum(tl.maximum(first, 0), L - (W - 1))
    state_ptr += slot * stride_state_slot
    state_rows = state_ptr + d.to(tl.int64) * stride_state_dim
    rows = ()  # history, then the tokens, [BLOCK_D] each
    for past in tl.static_range(W - 1):
        row_ptr = state_rows + (first + past) * stride_state_row
        rows += (tl.load(row_ptr, mask=ok, other=0.0),)
    for i in tl.static_range(MAX_TOKENS):
        rows += (tl.load(x_ptr + i * stride_x_row + d, mask=ok & (i < tokens), other=0.0),)
    taps = conv_taps(weight_ptr, d, D, W, BLOCK_W)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    for i in tl.static_range(MAX_TOKENS):
        y = conv_row(rows, i, taps, bias, W, SILU)
        tl.store(y_ptr + i * D + d, y.to(y_ptr.dtype.element_ty), mask=ok & (i < tokens))
    tl.debug_barrier()  # a row is not always written by the thread that read it
    for keep in tl.static_range(W - 2 + MAX_TOKENS):
        new = rows[keep + 1].to(state_ptr.dtype.element_ty)
        tl.store(state_rows + keep * stride_state_row, new, mask=ok & (keep < W - 2 + tokens))


def launch_short_conv_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    state_indices: Tensor | None, num_accepted: Tensor | None, cu_seqlens: Tensor | None,
    layout: str,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    D, W = x.shape[-1], int(weight.shape[1])
    stride_slot, stride_row, stride_dim = conv_state_strides(conv_state, layout)
    L = conv_state.shape[1 if layout == "SD" else 2]
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chosen = choose("short_conv_update", x.device, D=D, W=W, dtype=x.dtype, layout=layout)
    if cu_seqlens is not None:
        programs, max_tokens, stride_sequence = N + 1, int(L) - W + 2, 0
    else:
        tokens = int(x.shape[1]) if x.dim() == 3 else 1
        programs, max_tokens, stride_sequence = N, tokens, x.stride(0)
    traceable(short_conv_update_kernel)[(programs * triton.cdiv(D, chosen["BLOCK_D"]),)](
        x, conv_state, weight.contiguous(), contiguous(bias), y, state_indices,
        contiguous(num_accepted), contiguous(cu_seqlens), x.shape[0], D, N, conv_state.shape[0], L,
        stride_sequence, x.stride(-2), stride_slot, stride_row, stride_dim,
        0 if state_indices is None else state_indices.stride(0),
        W=W, BLOCK_W=triton.next_power_of_2(W), MAX_TOKENS=max_tokens, SILU=activation == "silu",
        HAS_BIAS=bias is not None, HAS_ACCEPTED=num_accepted is not None,
        VARLEN=cu_seqlens is not None, **chosen,
    )  # fmt: skip
    return y
