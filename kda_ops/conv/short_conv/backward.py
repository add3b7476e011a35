"""The gradient of `short_conv` on a GPU."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, is_nvidia, traceable
from kda_ops.conv.kernel import conv_blocks, conv_taps, three, token_block
from kda_ops.kernel import LOG2E, quick_reciprocal, to_fp32
from kda_ops.tuning import choose


@triton.jit
def before_activation(
    rows, dy, taps, bias,
    W: tl.constexpr, SILU: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's sum over `rows`, from that of its output."""
    gradient = dy
    if SILU:
        y = bias
        for tap in tl.static_range(W):
            y += rows[tap] * taps[tap]
        e = tl.exp2(y * -LOG2E)
        if EXACT:
            # 1 - s as e s: a difference would lose digits; without the limit inf times 0
            e = tl.minimum(e, 1e30)
            s = quick_reciprocal(1.0 + e, PACKED)
            gradient *= s * (1.0 + y * (e * s))
        else:  # the digits lost are beyond 16 bits
            s = quick_reciprocal(1.0 + e, PACKED)
            gradient *= s
            gradient += gradient * (y - y * s)
    return gradient


@triton.jit
def rows_from(at, stride, ok, left, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """ROWS rows as a tuple of vectors, and where the next is; without WHOLE, zeros where not `ok`
    and after `left` rows.
    """
    rows = ()
    for i in tl.static_range(ROWS):
        if WHOLE:
            rows += (tl.load(at),)
        else:
            rows += (tl.load(at, mask=ok & (i < left), other=0.0),)
        at += stride
    return rows, at


@triton.jit
def conv_gradients(
    xs, dys, dx_at, t, tokens, ok, stride_dx_row, window, sums, totals, taps, bias,
    W: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr, NEED_X: tl.constexpr,
    NEED_TOTALS: tl.constexpr, NEED_BIAS: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Goes on with rows xs of x and dys of y's gradient, from t on, of which those before `tokens`
    are own ones; with WHOLE all are, in all channels. Returns what the rows after them need.
    """
    # row by row: what a row is the last to need leaves its registers to the next
    for step in tl.static_range(len(xs)):
        rows = window
        rows += (to_fp32(xs[step], PACKED),)
        dy = to_fp32(dys[step], PACKED)
        gradient = before_activation(rows, dy, taps, bias, W, SILU, EXACT, PACKED)
        sums += (gradient,)
        if NEED_X:
            dx = sums[0] * taps[W - 1]
            for tap in tl.static_range(1, W):
                dx += sums[tap] * taps[W - 1 - tap]
            dx = dx.to(dx_at.dtype.element_ty)
            i = t + step - (W - 1)  # the row of x whose gradient is complete
            if not WHOLE:
                tl.store(dx_at, dx, mask=ok & (i >= 0) & (i < tokens))
            elif step < W - 1:
                tl.store(dx_at, dx, mask=i >= 0)
            else:
                tl.store(dx_at, dx)
            dx_at += stride_dx_row
        if NEED_TOTALS:
            if not WHOLE:
                gradient = tl.where(t + step < tokens, gradient, 0.0)
            added = ()
            for tap in tl.static_range(W):
                added += (totals[tap] + gradient * rows[tap],)
            if NEED_BIAS:
                added += (totals[W] + gradient,)
            totals = added
        window = rows[1:]
        sums = sums[1:]
    return dx_at, window, sums, totals


@triton.jit
def short_conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dy_1_ptr, dy_2_ptr, dx_ptr, totals_ptr, cu_seqlens_ptr,
    T, D, N, width_0, width_1, block_t, blocks_per_sequence, stride_x_batch, stride_x_row,
    stride_dx_row,
    W: tl.constexpr, BLOCK_W: tl.constexpr, STEP_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_X: tl.constexpr, NEED_TOTALS: tl.constexpr,
    NEED_BIAS: tl.constexpr, VARLEN: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of block_t tokens of one sequence x BLOCK_D channels.

    It goes through them in whole steps of STEP_T rows, without masks. What is left, which is all
    where not every channel exists, follows in short steps with masks, and so do the W - 1 rows
    after them: the gradient of a token needs those of the sums of these rows, which the program of
    their tokens computes too. Past the end of the sequence y's gradient counts as zero, and so does
    that of a sum: where it is NaN instead, an input that is not finite has made those of the last
    tokens NaN too.

    Of taps and, with NEED_BIAS, bias a program stores its own part, `[W + NEED_BIAS]` rows of
    `totals`, zeros for a block without tokens.

    With PARTS of 2 or 3, the gradient of y lies in so many dense tensors, one for the first
    `width_0` channels, one for the next `width_1`; both are multiples of BLOCK_D.

    Grid: token blocks x D blocks, D fastest, on the only axis without a limit of 65535.
    """
    EXACT: tl.constexpr = dx_ptr.dtype.element_ty == tl.float32
    TOTALS: tl.constexpr = W + NEED_BIAS
    AFTER: tl.constexpr = W - 1 if W > 1 else 1
    d_blocks = tl.cdiv(D, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    first_channel = tl.program_id(0) % d_blocks * BLOCK_D
    c = first_channel + tl.arange(0, BLOCK_D)
    ok = c < D
    n, first_row, length, start, active = token_block(
        cu_seqlens_ptr, pid, T, N, block_t, blocks_per_sequence, VARLEN
    )
    x_ptr += first_row * stride_x_row if VARLEN else n * stride_x_batch
    width, column = D, c
    if PARTS > 1:
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
    totals_ptr += pid * TOTALS * D
    stop = tl.minimum(start + block_t, length)

    # of the taps, then of the bias
    totals = ()
    for _ in tl.static_range(TOTALS):
        totals += (tl.zeros([BLOCK_D], tl.float32),)
    if active & (start < stop):
        taps = conv_taps(weight_ptr, c, D, W, BLOCK_W)
        bias = tl.zeros([BLOCK_D], tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
        window = ()  # the W - 1 rows before the next token
        for past in tl.static_range(W - 1):
            i = start + past - (W - 1)
            row = tl.load(x_ptr + i * stride_x_row + c, mask=ok & (i >= 0), other=0.0)
            window += (row.to(tl.float32),)
        sums = ()  # the gradients of the W - 1 sums before it: of no token of this program at first
        for _ in tl.static_range(W - 1):
            sums += (tl.zeros([BLOCK_D], tl.float32),)

        # from here on rows count from `start`
        tokens, left = (stop - start).to(tl.int32), (length - start).to(tl.int32)
        whole = tl.where(first_channel + BLOCK_D <= D, tokens // STEP_T * STEP_T, 0)
        x_at = x_ptr + start * stride_x_row + c
        dy_at = dy_ptr + start * width + column
        dx_at = dx_ptr + (start - (W - 1)) * stride_dx_row + c
        for t in range(0, whole, STEP_T):
            xs, x_at = rows_from(x_at, stride_x_row, ok, left, STEP_T, True)
            dys, dy_at = rows_from(dy_at, width, ok, left, STEP_T, True)
            if t < tokens:  # always: compilers do not delay loads past a branch
                dx_at, window, sums, totals = conv_gradients(
                    xs, dys, dx_at, t, tokens, ok, stride_dx_row, window, sums, totals, taps,
                    bias, W, True, SILU, NEED_X, NEED_TOTALS, NEED_BIAS, EXACT, PACKED,
                )  # fmt: skip
        # anew: of pointers from a loop Triton does not know that they are to neighbours
        x_at = x_ptr + (start + whole) * stride_x_row + c
        dy_at = dy_ptr + (start + whole) * width + column
        dx_at = dx_ptr + (start + whole - (W - 1)) * stride_dx_row + c
        for t in range(whole, tokens + (W - 1) * NEED_X, AFTER):
            xs, x_at = rows_from(x_at, stride_x_row, ok, left - t, AFTER, False)
            dys, dy_at = rows_from(dy_at, width, ok, left - t, AFTER, False)
            dx_at, window, sums, totals = conv_gradients(
                xs, dys, dx_at, t, tokens, ok, stride_dx_row, window, sums, totals, taps, bias, W,
                False, SILU, NEED_X, NEED_TOTALS, NEED_BIAS, EXACT, PACKED,
            )  # fmt: skip
    elif NEED_X:
        for i in range(start, stop):
            zeros = tl.zeros([BLOCK_D], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + i * stride_dx_row + c, zeros, mask=ok)
    if NEED_TOTALS:
        for row in tl.static_range(TOTALS):
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
        (blocks, W + need_bias, D) if need_totals else (0,), dtype=torch.float32, device=x.device
    )
    traceable(short_conv_backward_kernel)[(d_blocks * blocks,)](
        x, weight.contiguous(), contiguous(bias), *three([y.contiguous() for y in parts], None),
        dx, totals, contiguous(cu_seqlens), T, D, N, widths[0],
        widths[1] if len(parts) > 1 else 0, block_t, blocks_per_sequence, stride_batch,
        x.stride(-2), dx.stride(-2),
        W=W, BLOCK_W=triton.next_power_of_2(W), SILU=activation == "silu",
        HAS_BIAS=bias is not None, NEED_X=need_x, NEED_TOTALS=need_totals,
        NEED_BIAS=need_bias, VARLEN=cu_seqlens is not None, PARTS=len(parts),
        PACKED=is_nvidia(x.device), STEP_T=chosen["STEP_T"], BLOCK_D=chosen["BLOCK_D"],
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    gradients = [dx] if need_x else []
    if need_weight:  # permuted before the sum, whose result then is dense
        gradients.append(totals[:, :W].permute(0, 2, 1).sum(0).to(weight.dtype).contiguous())
    if need_bias:
        assert bias is not None
        gradients.append(totals[:, W].sum(0).to(bias.dtype))
    return gradients
