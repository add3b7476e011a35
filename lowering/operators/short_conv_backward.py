"""The gradient of the short convolution. Its kernel reads that of y, and writes that of x, where
they are part of other tensors.

In a layer the one is the concatenation of the gradients of q, k and v, the other is part of the
gradient of a packed projection. Each would be copied: at 8192 tokens of 32 heads of 128 that takes
100 us.
"""

from functools import wraps
from typing import Any

import torch
from torch import fx
from torch._inductor.lowering import empty_strided, lowerings, pointwise_cat
from torch._inductor.virtualized import V

from kda_ops._gradients import Signature
from kda_ops._registry import backward_of
from kda_ops.conv.short_conv.op import short_conv_op
from kda_ops.lowering.inline import call_operator, fake_arguments, inline_launcher, lowers, on_gpu

OP = backward_of(short_conv_op)
SIGNATURE = Signature(short_conv_op)
PARTS = "kda_ops parts"  # of a node that concatenates: what
WHOLE = "kda_ops whole"  # of a node that concatenates: the buffer, of which one part is written
aten = torch.ops.aten
cat = aten.cat.default
VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@lowers(OP)
def lower_short_conv_backward(*args: Any) -> Any:
    *inputs, gradient, needs = args
    if not on_gpu(inputs[0]) or gradient is None:
        return call_operator(*args)
    from kda_ops.conv.short_conv.backward import launch_short_conv_backward

    node = V.graph.current_node
    values, count = fake_arguments(), len(inputs)
    made = node.args[-2]
    parts = made.meta.get(PARTS, [gradient])
    shown = [part.meta["val"] for part in (made.args[0] if PARTS in made.meta else [made])]
    dx, dx_value = place_of_input(node) if needs[0] else (None, None)

    def launch(*given: Any) -> Any:
        dy, out = list(given[count:-1]), given[-1]
        arguments = [*given[:count], [dy if len(dy) > 1 else dy[0]], needs, out]
        return SIGNATURE.gradients((*given[:count], needs), launch_short_conv_backward(*arguments))

    return inline_launcher(
        launch, *inputs, *parts, dx, values=[*values[:count], *shown, dx_value], writes=(dx,)
    )


def place_of_input(node: fx.Node) -> tuple[Any, Any]:
    """Where the gradient of x is part of a concatenation along the channels: its place in a new
    buffer for the whole, and the fake value of it; else None twice.
    """
    first = next((user for user in node.users if user.args[1] == 0), None)
    if first is None:
        return None, None
    reader, value = first, first.meta["val"]
    while len(reader.users) == 1:
        reader = next(iter(reader.users))
        if reader.target not in VIEWS or reader.meta["val"].shape[-1] != value.shape[-1]:
            break
    if not joins_channels(reader) or WHOLE in reader.meta:
        return None, None
    whole = reader.meta["val"]
    widths = [part.meta["val"].shape[-1] for part in reader.args[0]]
    place = next(i for i, part in enumerate(reader.args[0]) if leads_to(part, first))
    rows, width = value.numel() // value.shape[-1], whole.shape[-1]
    buffer = empty_strided(
        [_expression(rows), width], [width, 1], dtype=whole.dtype, device=whole.device
    )
    reader.meta[WHOLE] = (buffer, place)
    start = sum(widths[:place])
    part = lowerings[aten.slice.Tensor](buffer, 1, start, start + widths[place])
    part = lowerings[aten.view.default](part, [_expression(n) for n in value.shape])
    with V.fake_mode:
        shown = torch.empty(rows, width, dtype=whole.dtype, device=whole.device)
        shown = shown[:, start : start + widths[place]].view(value.shape)
    return part, shown


def leads_to(part: Any, source: fx.Node) -> bool:
    """Whether a node is a view of another."""
    while part is not source and part.target in VIEWS:
        part = part.args[0]
    return part is source


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def joins_channels(node: fx.Node) -> bool:
    """Whether a node concatenates tensors of one dtype and known widths along the last axis."""
    if node.target is not cat:
        return False
    axis, value = node.args[1] if len(node.args) > 1 else 0, node.meta["val"]
    shown = [part.meta["val"] for part in node.args[0]]
    return axis in (-1, value.dim() - 1) and all(
        x.dtype == value.dtype and isinstance(x.shape[-1], int) for x in shown
    )


def read_apart(node: fx.Node) -> bool:
    """Whether a concatenation is the gradient of y and nothing else, in two or three parts."""
    only = all(user.target is OP and user.args[-2] is node for user in node.users)
    return only and len(node.args[0]) in (2, 3) and joins_channels(node)


def join_in_place(inputs: list[Any], buffer: Any, place: int, shape: Any) -> Any:
    """The concatenation, of which part `place` is in the buffer already."""
    rows = buffer.get_size()[0]
    start = 0
    for some in (inputs[:place], inputs[place : place + 1], inputs[place + 1 :]):
        width = sum(x.get_size()[-1] for x in some)
        if some and some[0] is not inputs[place]:
            flat = [lowerings[aten.view.default](x, [rows, x.get_size()[-1]]) for x in some]
            to = lowerings[aten.slice.Tensor](buffer, 1, start, start + width)
            lowerings[aten.copy_.default](to, pointwise_cat(flat, 1) if flat[1:] else flat[0])
        start += width
    return lowerings[aten.view.default](buffer, shape)


def keep_in_place() -> None:
    """Makes Inductor's lowering of a concatenation leave what is read or written in place."""
    lower = lowerings[cat]

    @wraps(lower)
    def lower_cat(inputs: Any, dim: int = 0) -> Any:
        node = V.graph.current_node
        if node.target is cat and WHOLE in node.meta:
            shape = [_expression(n) for n in node.meta["val"].shape]
            buffer, place = node.meta.pop(WHOLE)
            return join_in_place(list(inputs), buffer, place, shape)
        if node.target is cat and on_gpu(inputs[0]) and read_apart(node):
            node.meta[PARTS] = inputs
            return pointwise_cat(inputs, dim)
        return lower(inputs, dim)

    lowerings[cat] = lower_cat


keep_in_place()
