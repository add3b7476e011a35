"""The gradient of `short_conv` on a GPU."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.conv.kernel import conv_blocks, conv_taps, three, token_block
from kda_ops.kernel import LOG2E
from kda_ops.tuning import choose


@triton.jit
def before_activation(
    rows, i: tl.constexpr, dy, taps, bias, W: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """The gradient of the convolution's sum from that of output row i, from rows i .. i + W - 1."""
    gradient = dy.to(tl.float32)
    if SILU:
        y = bias
        for tap in tl.static_range(W):
            y += rows[i + tap].to(tl.float32) * taps[tap]
        # 1 - s as e s: a difference would lose digits; without the limit it would be inf times 0
        e = tl.minimum(tl.exp2(y * -LOG2E), 1e30)
        r = tl.rsqrt(1.0 + e)
        s = r * r
        gradient *= s * (1.0 + y * (e * s))
    return gradient


@triton.jit
def of_input(sums, i: tl.constexpr, taps, W: tl.constexpr):
    """The gradient of input row i, from those of the sums in rows i .. i + W - 1."""
    dx = sums[i] * taps[W - 1]
    for tap in tl.static_range(1, W):
        dx += sums[i + tap] * taps[W - 1 - tap]
    return dx


@triton.jit
def conv_gradients(
    x_ptr, dy_ptr, dx_ptr, t, start, stop, length, c, column, ok, stride_x_row, width,
    stride_dx_row, window, sums, taps, bias,
    W: tl.constexpr, STEP_T: tl.constexpr, SILU: tl.constexpr, NEED_X: tl.constexpr,
):  # fmt: skip
    """STEP_T more rows of x behind `window`, and gradients of the convolution's sums behind `sums`.

    The gradients of x that are complete with them are stored, where they are of own tokens. Past
    the end of the sequence y's gradient counts as zero, and so does that of a sum: where it is NaN
    instead, an input that is not finite has made those of the last tokens NaN too.
    """
    rows = window
    dys = ()
    for step in tl.static_range(STEP_T):
        there = ok & (t + step < length)
        rows += (tl.load(x_ptr + (t + step) * stride_x_row + c, mask=there, other=0.0),)
        dys += (tl.load(dy_ptr + (t + step) * width + column, mask=there, other=0.0),)
    for step in tl.static_range(STEP_T):
        sums += (before_activation(rows, step, dys[step], taps, bias, W, SILU),)
    if NEED_X:
        for step in tl.static_range(STEP_T):
            i = t + step - (W - 1)
            dx = of_input(sums, step, taps, W).to(dx_ptr.dtype.element_ty)
            mask = ok & (i >= start) & (i < stop)
            tl.store(dx_ptr + i * stride_dx_row + c, dx, mask=mask)
    return rows, sums


@triton.jit
def short_conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dy_1_ptr, dy_2_ptr, dx_ptr, totals_ptr, cu_seqlens_ptr,
    T, D, N, width_0, width_1, block_t, blocks_per_sequence, stride_x_batch, stride_x_row,
    stride_dx_row,
    W: tl.constexpr, BLOCK_W: tl.constexpr, STEP_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_X: tl.constexpr, NEED_TOTALS: tl.constexpr,
    VARLEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of block_t tokens of one sequence x BLOCK_D channels.

    The gradient of a token needs those of the W - 1 sums after it, which are computed again by the
    program of the tokens that follow. Of taps and bias a program stores its own part, `[W + 1]`
    rows of `totals`, zeros for a block without tokens.

    With PARTS of 2 or 3, the gradient of y lies in so many dense tensors, one for the first
    `width_0` channels, one for the next `width_1`; both are multiples of BLOCK_D.

    Grid: token blocks x D blocks, D fastest, on the only axis without a limit of 65535.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    c = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = c < D
    n, first_row, length, start, active = token_block(
        cu_seqlens_ptr, pid, T, N, block_t, blocks_per_sequence, VARLEN
    )
    x_ptr += first_row * stride_x_row if VARLEN else n * stride_x_batch
    width, column = D, c
    if PARTS > 1:
        first_channel = tl.program_id(0) % d_blocks * BLOCK_D
        width = width_0
        if first_channel >= width_0:
            dy_ptr = dy_1_ptr
            width = width_1
            column = c - width_0
        if PARTS == 3 and first_channel >= width_0 + width_1:
            dy_ptr = dy_2_ptr
            width = D - width_0 - width_1
            column = c - width_0 - width_1
    dy_ptr += first_row * width
    dx_ptr += first_row * stride_dx_row
    totals_ptr += pid * (W + 1) * D
    stop = tl.minimum(start + block_t, length)

    # of the taps, then of the bias
    totals = ()
    for _ in tl.static_range(W + 1):
        totals += (tl.zeros([BLOCK_D], tl.float32),)
    if active:
        taps = conv_taps(weight_ptr, c, D, W, BLOCK_W)
        bias = tl.zeros([BLOCK_D], tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
        window = ()  # the W - 1 rows before the next token
        for past in tl.static_range(W - 1):
            i = start + past - (W - 1)
            there = ok & (i >= 0) & (i < length)
            window += (tl.load(x_ptr + i * stride_x_row + c, mask=there, other=0.0),)
        sums = ()  # the gradients of the W - 1 sums before it: of no token of this program at first
        for _ in tl.static_range(W - 1):
            sums += (tl.zeros([BLOCK_D], tl.float32),)

        # whole steps of own tokens: those past `stop` are past the sequence's end, and zero
        for t in range(start, stop, STEP_T):
            rows, sums = conv_gradients(
                x_ptr, dy_ptr, dx_ptr, t, start, stop, length, c, column, ok, stride_x_row, width,
                stride_dx_row, window, sums, taps, bias, W, STEP_T, SILU, NEED_X,
            )  # fmt: skip
            if NEED_TOTALS:
                for step in tl.static_range(STEP_T):
                    gradient = sums[W - 1 + step]
                    added = ()
                    for tap in tl.static_range(W):
                        added += (totals[tap] + gradient * rows[step + tap].to(tl.float32),)
                    added += (totals[W] + gradient,)
                    totals = added
            window = rows[STEP_T:]
            sums = sums[STEP_T:]
        if NEED_X:
            end = start + tl.cdiv(stop - start, STEP_T) * STEP_T
            for t in range(end, stop + W - 1, STEP_T):
                rows, sums = conv_gradients(
                    x_ptr, dy_ptr, dx_ptr, t, start, stop, length, c, column, ok, stride_x_row,
                    width, stride_dx_row, window, sums, taps, bias, W, STEP_T, SILU, NEED_X,
                )  # fmt: skip
                window = rows[STEP_T:]
                sums = sums[STEP_T:]
    elif NEED_X:
        for i in range(start, stop):
            zeros = tl.zeros([BLOCK_D], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + i * stride_dx_row + c, zeros, mask=ok)
    if NEED_TOTALS:
        for row in tl.static_range(W + 1):
            tl.store(totals_ptr + row * D + c, totals[row], mask=ok)


def launch_short_conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None, output_gradients: Sequence[Tensor | Sequence[Tensor] | None],
    needs_gradient: Sequence[bool], dx: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradient of y may be given as the two or three tensors of which it is the concatenation
    along the channels. That of x is written to `dx` if it is given, whose leading axes must be
    dense rows.
    """
    (dy,) = output_gradients
    need_x, need_weight, need_bias = needs_gradient[:3]
    if dy is None:
        needed = zip((x, weight, bias), needs_gradient[:3], strict=True)
        return [torch.zeros_like(y) for y, need in needed if need and y is not None]
    if x.stride(-1) != 1:
        x = x.contiguous()
    T, D = x.shape[-2:]
    W = int(weight.shape[1])
    batch, stride_batch = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    chosen = choose("short_conv_backward", x.device, D=D, W=W, dtype=x.dtype)
    d_blocks = triton.cdiv(D, chosen["BLOCK_D"])
    block_t, blocks_per_sequence, N, blocks = conv_blocks(
        batch, T, cu_seqlens, d_blocks, chosen["STEP_T"], chosen["MAX_STEPS"], chosen["PROGRAMS"]
    )
    parts = [dy] if isinstance(dy, Tensor) else list(dy)
    widths = [y.shape[-1] for y in parts]
    if len(parts) > 1 and any(width % chosen["BLOCK_D"] for width in widths):
        parts = [torch.cat(parts, -1)]
    need_totals = need_weight or need_bias
    if dx is None:
        dx = torch.empty(x.shape if need_x else (0, D), dtype=x.dtype, device=x.device)
    totals = torch.empty(
        (blocks, W + 1, D) if need_totals else (0,), dtype=torch.float32, device=x.device
    )
    traceable(short_conv_backward_kernel)[(d_blocks * blocks,)](
        x, weight.contiguous(), contiguous(bias), *three([y.contiguous() for y in parts], None),
        dx, totals, contiguous(cu_seqlens), T, D, N, widths[0],
        widths[1] if len(parts) > 1 else 0, block_t, blocks_per_sequence, stride_batch,
        x.stride(-2), dx.stride(-2),
        W=W, BLOCK_W=triton.next_power_of_2(W), SILU=activation == "silu",
        HAS_BIAS=bias is not None, NEED_X=need_x, NEED_TOTALS=need_totals,
        VARLEN=cu_seqlens is not None, PARTS=len(parts), STEP_T=chosen["STEP_T"],
        BLOCK_D=chosen["BLOCK_D"], num_warps=chosen["num_warps"],
    )  # fmt: skip
    gradients = [dx] if need_x else []
    if need_weight:  # permuted before the sum, whose result then is dense
        gradients.append(totals[:, :W].permute(0, 2, 1).sum(0).to(weight.dtype).contiguous())
    if need_bias:
        assert bias is not None
        gradients.append(totals[:, W].sum(0).to(bias.dtype))
    return gradients
