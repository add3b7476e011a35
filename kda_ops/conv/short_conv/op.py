"""The short convolution of whole sequences: schemas, fake implementations, public function."""

from typing import Literal, overload

import torch
from torch import Tensor

from kda_ops._checks import check_rank
from kda_ops._registry import define_op, selected
from kda_ops._roles import BLOCKS, CONTEXTS, CONV_PAGES, OFFSETS, SLOTS
from kda_ops.blocks import BLOCK_ARGUMENTS, Blocks
from kda_ops.config import resolve_layout
from kda_ops.conv.checks import (
    check_conv_blocks,
    check_conv_sequences,
    check_conv_values,
    resolve_activation,
    taps_of,
)
from kda_ops.conv.history import check_history, convolved_behind
from kda_ops.conv.short_conv.reference import short_conv_reference, short_conv_state_reference
from kda_ops.native import define_native


def short_conv_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check_short_conv_values(x: Tensor, cu_seqlens: Tensor | None) -> None:
    check_conv_values(x, cu_seqlens, None, None)


def check_short_conv_state_values(
    x: Tensor, conv_state: Tensor, state_indices: Tensor | None, cu_seqlens: Tensor | None,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> None:  # fmt: skip
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    check_conv_values(x, cu_seqlens, conv_state, state_indices, blocks)


short_conv_op = define_op(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, str? activation, "
    "Tensor? cu_seqlens) -> Tensor",
    reference=short_conv_reference,
    fake=short_conv_fake,
    cuda="kda_ops.conv.short_conv.kernel:launch_short_conv",
    cuda_backward="kda_ops.conv.short_conv.backward:launch_short_conv_backward",
    roles={"cu_seqlens": OFFSETS},
    check_values=check_short_conv_values,
)

short_conv_state_op = define_op(
    "short_conv.state(Tensor x, Tensor weight, Tensor? bias, str? activation, "
    "Tensor(a!) conv_state, Tensor? state_indices, Tensor? has_initial_state, "
    f"Tensor? cu_seqlens, str layout, {BLOCK_ARGUMENTS}) -> Tensor",
    reference=short_conv_state_reference,
    fake=short_conv_fake,
    cuda="kda_ops.conv.short_conv.kernel:launch_short_conv_state",
    roles={
        "conv_state": CONV_PAGES,
        "state_indices": SLOTS,
        "cu_seqlens": OFFSETS,
        "block_table": BLOCKS,
        "context_lens": CONTEXTS,
    },
    check_values=check_short_conv_state_values,
)
define_native(short_conv_op, "kda_ops.conv.native:short_conv")
define_native(short_conv_state_op, "kda_ops.conv.native:short_conv_state")


@overload
def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    conv_state: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False, cu_seqlens: Tensor | None = None,
    layout: str | None = None, block_table: Tensor | None = None,
    context_lens: Tensor | None = None, block_tokens: int | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    conv_state: None = None, state_indices: None = None, has_initial_state: None = None,
    initial_state: Tensor | None = None, output_final_state: Literal[True],
    cu_seqlens: Tensor | None = None, layout: str | None = None, block_table: None = None,
    context_lens: None = None, block_tokens: None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    conv_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    block_table: Tensor | None = None,
    context_lens: Tensor | None = None,
    block_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution of whole sequences, with its activation.

    Per sequence, `y[t] = silu(sum_w weight[:, w] * x[t - (W - 1) + w] + bias)`, where the W - 1
    tokens before the first one are the history: rows `[0, W - 1)` of the sequence's slot in
    `conv_state` if the sequence has an initial state, else zeros.

    With `conv_state`, the last W - 1 rows of `concat(history, x)` are then written to rows `[0, W -
    1)` of the slot. So a sequence shorter than W - 1 keeps the end of its history (zeros without an
    initial state), and an empty one keeps its initial state or, without one, writes zeros. Rows
    from W - 1 on are not touched. Slot 0 is the null block, and a negative slot is as good: the
    output of such a sequence is zero, and no state is read or written. Rows of x past the last
    sequence are not read and give zero.

    States may also be values, in `initial_state` and the second result: training over parts of a
    sequence has gradients of both.

    Source: Kimi Linear (arXiv:2510.26692), section 4; FlashLinearAttention's `ShortConvolution`.

    Args:
        x: `[B, T, D]`, or `[T, D]` for one sequence; fp16, bf16 or fp32 (fp64 on the CPU). With
            `cu_seqlens`, B is 1. Copied if the last axis is not contiguous.
        weight: `[D, W]`, or `[D, 1, W]` as in `nn.Conv1d`, W at least 2; the last tap applies to
            the token itself.
        bias: `[D]` or None.
        activation: `"silu"` (also called `"swish"`) or None.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS, `L >= W - 1`, any
            strides, written in place. Its dtype may differ from that of x.
        state_indices: `[N]`, int32 or int64, the slot of each sequence; unique, except those of
            padding. None with `conv_state`: sequence n is page n of at least N, and none is null.
        has_initial_state: `[N]`, bool. None means that no sequence has one.
        initial_state: `[N, W - 1, D]` in layout SD, `[N, D, W - 1]` in layout DS, the tokens before
            each sequence; not with `conv_state`. Rounded to x's dtype.
        output_final_state: Whether to return the last W - 1 tokens of each sequence, in that
            layout; not with `conv_state`.
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; empty ones are
            allowed.
        block_table: `[N, blocks]`, int32 or int64, with `conv_state`: the slot of the state after
            each full block of a sequence, of blocks that end in this call; entries that are 0,
            negative or out of range are skipped. Rows from W - 1 on are not touched. See
            `chunk_kda`.
        context_lens: `[N]`, int32 or int64, with `block_table`: the tokens of each sequence before
            this call, multiples of 64. Zeros if None.
        block_tokens: Tokens of a block, a multiple of 64, with `block_table`.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.

    Returns:
        The shape and dtype of x, contiguous; with `output_final_state` also the final state.

    Raises:
        ValueError: An invalid shape, dtype, device, activation, layout, offset or slot, or a state
            argument without `conv_state`.
        RuntimeError: An argument requires grad and `conv_state` is given (the call without a state
            is differentiable).
    """
    activation = resolve_activation(activation)
    check_rank("x", x, 2, 3)
    weight = taps_of(weight)
    state = initial_state if conv_state is None else conv_state
    layout = resolve_layout(layout, state, x.shape[-1])
    check_conv_sequences(
        x, weight, bias, conv_state, state_indices, has_initial_state, cu_seqlens, layout
    )
    parts = [(x, weight, bias, conv_state)]
    check_conv_blocks(parts, cu_seqlens, block_table, context_lens, block_tokens)
    past = weight.shape[1] - 1
    check_history(initial_state, conv_state, x, past, cu_seqlens, layout, output_final_state)
    if initial_state is not None or output_final_state:
        op = selected(short_conv_op)
        (y,), finals = convolved_behind(
            lambda xs, offsets: [op(*xs, weight, bias, activation, offsets)],
            [x if x.dim() == 3 else x[None]], [initial_state], past, cu_seqlens, layout,
            output_final_state,
        )  # fmt: skip
        return (y.view(x.shape), *finals) if finals else y.view(x.shape)
    if conv_state is None:
        return selected(short_conv_op)(x, weight, bias, activation, cu_seqlens)
    return selected(short_conv_state_op)(
        x, weight, bias, activation, conv_state, state_indices, has_initial_state, cu_seqlens,
        layout, block_table, context_lens, block_tokens or 0,
    )  # fmt: skip
