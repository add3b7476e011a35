"""The parts of a convolution state: schema, fake, public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kda_ops._checks import check_dtype, check_integer, check_rank
from kda_ops._registry import define_op, selected
from kda_ops.cache.conv_split.reference import conv_split_reference
from kda_ops.config import resolve_layout


def conv_split_fake(conv_state: Tensor, sizes: list[int], layout: str) -> list[Tensor]:
    slots, rows, columns = conv_state.shape
    shapes = [(slots, rows, n) if layout == "SD" else (slots, n, columns) for n in sizes]
    return [torch.empty(s, dtype=conv_state.dtype, device=conv_state.device) for s in shapes]


conv_split_op = define_op(
    "conv_split(Tensor conv_state, SymInt[] sizes, str layout) -> Tensor[]",
    reference=conv_split_reference,
    fake=conv_split_fake,
    cuda="kda_ops.cache.conv_split.kernel:launch_conv_split",
    moves_only=True,
)


def conv_split(
    conv_state: Tensor, sizes: Sequence[int], *, layout: str | None = None
) -> tuple[Tensor, ...]:
    """The parts of a convolution state along its channels: q | k | v for sizes `(H * K, H * K, HV *
    V)`.

    The sizes are explicit since the parts are not equal thirds if `H * K != HV * V`. The parts are
    copies, not views: later writes to the state do not affect them. Compiled, they fuse into their
    users without a copy.

    Args:
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS, any strides, any
            floating dtype.
        sizes: Channels of each part; they add up to D.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.

    Returns:
        `[slots, L, size]` (SD) or `[slots, size, L]` (DS) for each size, contiguous.

    Raises:
        ValueError: An invalid shape, dtype or layout, or sizes that are negative or do not add up
            to D.
    """
    check_dtype("conv_state", conv_state)
    check_rank("conv_state", conv_state, 3)
    if not isinstance(sizes, (tuple, list)):
        raise ValueError(f"sizes must be a list of integers, got {sizes!r}")
    for n in sizes:
        check_integer("sizes", n)
    sizes = list(sizes)
    layout = resolve_layout(layout, conv_state, sum(sizes))
    D = conv_state.shape[2 if layout == "SD" else 1]
    if any(n < 0 for n in sizes):
        raise ValueError(f"sizes must not be negative, got {sizes}")
    if sum(sizes) != D:
        raise ValueError(
            f"sizes must add up to {D}, the channels of conv_state in layout {layout}, "
            f"got {sizes} = {sum(sizes)}"
        )
    return tuple(selected(conv_split_op)(conv_state, sizes, layout))
