"""The short convolution of new tokens against its state: schema, fake, public function."""

import torch
from torch import Tensor

from kda_ops._checks import (
    check_accepted,
    check_cu_seqlens_shape,
    check_cu_seqlens_values,
    check_device,
    check_page_values,
    check_pages,
    check_rank,
    check_slot_table,
)
from kda_ops._registry import define_op, selected
from kda_ops._roles import CONV_PAGES, OFFSETS, SLOTS
from kda_ops.config import resolve_layout
from kda_ops.conv.checks import check_conv, check_conv_state, resolve_activation, taps_of
from kda_ops.conv.short_conv_update.reference import short_conv_update_reference


def short_conv_update_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check_short_conv_update_values(
    x: Tensor, conv_state: Tensor, weight: Tensor, state_indices: Tensor | None,
    num_accepted: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> None:  # fmt: skip
    if state_indices is not None and state_indices.dim() == 2:
        state_indices = state_indices[:, 0]
    check_page_values(conv_state, state_indices)
    most = conv_state.shape[1 if layout == "SD" else 2] - weight.shape[1] + 2
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x.shape[0])
        longest = max((cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), default=0)
        if longest > most:
            raise ValueError(
                f"cu_seqlens must have at most {most} tokens in a sequence, got {longest}"
            )
    if num_accepted is not None:
        bad = (num_accepted < 1) | (num_accepted > most)
        if state_indices is not None:
            bad &= state_indices > 0
        bad = bad.nonzero()
        if len(bad):
            raise ValueError(
                f"num_accepted must be in [1, {most}], got {int(num_accepted[bad[0]])}"
            )


short_conv_update_op = define_op(
    "short_conv_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "str? activation, Tensor? state_indices, Tensor? num_accepted, Tensor? cu_seqlens, "
    "str layout) -> Tensor",
    reference=short_conv_update_reference,
    fake=short_conv_update_fake,
    cuda="kda_ops.conv.short_conv_update.kernel:launch_short_conv_update",
    roles={"conv_state": CONV_PAGES, "state_indices": SLOTS, "cu_seqlens": OFFSETS},
    check_values=check_short_conv_update_values,
)


def short_conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
) -> Tensor:
    """Depthwise causal convolution of a few new tokens per sequence; shifts the state in place.

    The history of sequence n is rows `[a - 1, a - 1 + W - 1)` of its slot, where `a` is the number
    of tokens accepted from the previous step (1 without `num_accepted`). Each token gives `y =
    silu(sum_w weight[:, w] * window[w] + bias)` over the W rows that end with it. Then
    `concat(history[1:], x_0 .. x_{q-1})` is written from row 0 on; later rows are not touched. All
    tokens of the step are kept, so that the next step can accept any number of them.

    A sequence without tokens keeps its state. Slot 0 is the null block, and a negative slot is as
    good: the output of such a sequence is zero, and no state is read or written. Rows of x past the
    last sequence are not read and give zero.

    Source: Kimi Linear (arXiv:2510.26692), section 4; the linear window of speculative decoding
    follows vLLM's `causal_conv1d_update`.

    Args:
        x: `[N, D]` (a token each), `[N, q, D]` (q each), or `[T, D]` with `cu_seqlens`; fp16, bf16
            or fp32 (fp64 on the CPU). Copied if the last axis is not contiguous.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS, `L >= W - 2 + q`,
            any strides, written in place. Its dtype may differ from that of x.
        weight: `[D, W]`, or `[D, 1, W]` as in `nn.Conv1d`, W at least 2; the last tap applies to
            the token itself.
        bias: `[D]` or None.
        activation: `"silu"` (also called `"swish"`) or None.
        state_indices: `[N]`, int32 or int64, the slot of each sequence, or `[N, 1 + num_spec]`, of
            which column 0 is used. Unique, except those of padding. None: sequence n is page n of
            at least N, and none is null.
        num_accepted: `[N]`, int32 or int64, in `[1, L - W + 2]`; ignored for padding.
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; empty ones are
            allowed.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: An invalid shape, dtype, device, activation, layout, offset, slot or count.
        RuntimeError: An argument requires grad.
    """
    activation = resolve_activation(activation)
    if cu_seqlens is None:
        check_rank("x", x, 2, 3)
        sequences = x.shape[0]
    else:
        check_rank("x", x, 2)
        check_cu_seqlens_shape(cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
    weight = taps_of(weight)
    check_conv(x, weight, bias)
    layout = resolve_layout(layout, conv_state, x.shape[-1])
    W = weight.shape[1]
    check_conv_state(conv_state, layout, x.shape[-1], W)
    most = conv_state.shape[1 if layout == "SD" else 2] - W + 2
    if x.dim() == 3 and x.shape[1] > most:
        raise ValueError(
            f"x must have at most {most} tokens per sequence for a conv_state of shape "
            f"{tuple(conv_state.shape)}, got {x.shape[1]}"
        )
    check_slot_table(state_indices, sequences)
    check_pages("conv_state", conv_state, state_indices, sequences)
    if num_accepted is not None:
        check_accepted(num_accepted, sequences)
    check_device(
        x=x, conv_state=conv_state, weight=weight, bias=bias, state_indices=state_indices,
        num_accepted=num_accepted, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return selected(short_conv_update_op)(
        x, conv_state, weight, bias, activation, state_indices, num_accepted, cu_seqlens, layout
    )
