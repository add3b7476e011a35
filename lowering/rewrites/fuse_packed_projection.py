"""Projections put side by side for one convolution are written side by side: no copy.

    cat([view(mm(x, q)), view(mm(x, k)), view(mm(x, v))], -1) -> short_conv, ...
    view(cat([mm(x, q), mm(x, k), mm(x, v)], 1)) -> short_conv, ...
    cat(the slices of one projection) -> the projection

Inductor lets a matrix product write into its part of a concatenation, but not through a view, and a
linear layer on `[B, T, hidden]` is a product between two views. With frozen weights Inductor makes
one product of several; their parts are slices that need not be put together again.
"""

import operator
from typing import Any

import torch
from torch import fx

from kda_ops.conv.short_conv.op import short_conv_op, short_conv_state_op
from kda_ops.conv.short_conv_qkv.op import short_conv_qkv_op, short_conv_qkv_state_op
from kda_ops.conv.short_conv_update.op import short_conv_update_op
from kda_ops.delta_rule.kda_decode.op import kda_decode_op
from kda_ops.lowering.graph.emitting import compute, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    is_view,
    same_shape,
    strip_views,
    value,
)
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.heads import channels

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)
CONVOLUTIONS = (
    kda_decode_op,
    short_conv_op,
    short_conv_state_op,
    short_conv_qkv_op,
    short_conv_qkv_state_op,
    short_conv_update_op,
)


def pattern(node: fx.Node) -> Match | None:
    rank = value(node).dim()
    axis = node.args[1] if len(node.args) > 1 else 0
    if axis % rank != rank - 1 or not is_convolved(node):
        return None
    inner, sources = [node], []
    for part in node.args[0]:
        source, path = strip_views(part)
        inner += path
        sources.append(source)
    packed = whole(sources)
    inputs = sources if packed is None else [packed]
    return Match(inner, [node], inputs, {"cat": node, "sources": sources, "packed": packed})


def is_convolved(x: fx.Node) -> bool:
    """Whether a convolution reads `x`, or a view of it; a backward may too."""
    for user in x.users:
        if is_view(user) and is_convolved(user):
            return True
        call = Call.of(user)
        if call is not None and call.op in CONVOLUTIONS and call.args["x"] is x:
            return True
    return False


def whole(sources: list[fx.Node]) -> fx.Node | None:
    """The tensor that has been cut into these parts, in this order."""
    cut = sources[0]
    x: Any = cut.args[0] if cut.op == "call_function" and cut.args else None
    if cut.target is operator.getitem:
        x = x.args[0]
    if not isinstance(x, fx.Node) or not isinstance(value(x), torch.Tensor):
        return None
    pieces = dict(reversed(piece) for piece in channels(x)[1]) if value(x).dim() else {}
    edges = [pieces[source] for source in sources if source in pieces]
    if len(edges) < len(sources):
        return None
    stops = [0, *[stop for _, stop in edges]]
    joined = all(start == before for (start, _), before in zip(edges, stops, strict=False))
    return x if joined and stops[-1] == value(x).shape[-1] else None


def guard(match: Match) -> Refusal | None:
    cat, sources = match.values["cat"], match.values["sources"]
    parts = list(zip(cat.args[0], sources, strict=True))
    for part, source in parts:
        if not same_shape(value(source).shape[-1:], value(part).shape[-1:]):
            return Refusal(f"{source.name} is cut along its channels", source)
    if match.values["packed"] is not None:
        return None
    for source in sources:
        if source.target not in PRODUCTS:
            return Refusal(f"{source.name} is not a matrix product", source)
        if len(source.users) != 1:
            return Refusal(f"{source.name} has other uses than the convolution", source)
    if all(part is source for part, source in parts):
        return Refusal("there is no view in between")
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    cat, packed = match.values["cat"], match.values["packed"]
    if packed is None:
        packed = compute(graph, aten.cat.default, match.values["sources"], 1)
    return {cat: reshape(graph, packed, value(cat).shape)}


register("packed_projection", (aten.cat.default,), pattern, guard, replacement)
