"""The cumulative sum in plain PyTorch that a chunked recurrence takes is the operator.

    cumsum(view(g, [B, T / C, C, ...]), 2) -> view back
    cumsum(view(pad(g), [B, ceil(T / C), C, ...]), 2) -> view back -> slice [:, :T]
    chunk_cumsum(g, C)

The first two axes may be one, and a number may scale before the sum. (After it is
`fuse_cumsum_scale`.)
"""

import itertools
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.lowering.graph.emitting import compute, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    is_view,
    only_user,
    same_shape,
    strip_views,
    value,
)
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, POST_GRAD, Match, register

aten, prims = torch.ops.aten, torch.ops.prims
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PASSES = (aten.mul.Tensor, aten.slice.Tensor, prims.convert_element_type.default)


def pattern(node: fx.Node) -> Match | None:
    path = path_to_recurrence(node)
    if path is None:
        return None
    B, T, *D = value(path[-1]).shape
    after = [node, *itertools.takewhile(cuts_or_views, path[1:])]
    y = next((n for n in after if same_shape(value(n).shape[:2], (B, T))), node)
    x, views = strip_views(node.args[0])
    inner, scale, padded = [*views, *path[: path.index(y) + 1]], 1.0, None
    if x.target is aten.constant_pad_nd.default:
        inner.insert(0, x)
        x, padded = x.args[0], x
    if x.target is aten.mul.Tensor and type(x.args[1]) in (int, float) and only_user(x):
        inner.insert(0, x)
        x, scale = x.args[0], float(x.args[1])
    found = {"g": x, "scale": scale, "cumsum": node, "y": y, "padded": padded, "shape": (B, T, *D)}
    found["between"] = path[1 : path.index(y)]
    return Match(inner, [y], [x], found)


def path_to_recurrence(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from one to the argument G of a chunked recurrence, if nothing else uses them."""
    path = [node]
    while (user := only_user(path[-1])) is not None:
        call = Call.of(user)
        if call is not None:
            taken = (
                call.op in (chunk_kda_op, chunk_kda_state_op) and call.args["g_cumsum"] is path[-1]
            )
            return path if taken else None
        if not is_view(user) and user.target not in PASSES:
            return None
        path.append(user)
    return None


def cuts_or_views(node: fx.Node) -> bool:
    return is_view(node) or node.target is aten.slice.Tensor


def guard(match: Match) -> Refusal | None:
    g, cumsum, y, padded = (match.values[name] for name in ("g", "cumsum", "y", "padded"))
    B, T, *D = match.values["shape"]
    sizes = value(cumsum).shape
    axis = cumsum.args[1] % len(sizes)
    if not statically_known_true(prod(sizes[axis + 1 :]) == prod(D)):
        return Refusal(f"{cumsum.name} is not along the tokens")
    view = cumsum.args[0]
    # with another size to be match out, the one written there is lost in the value
    chunk = view.args[1][axis] if view.target in RESHAPES else sizes[axis]
    if not statically_known_true(chunk == CHUNK):
        return Refusal(f"{cumsum.name} sums over {chunk} tokens, not {CHUNK}")
    if padded is not None and not only_tokens_padded(padded, y, B, T):
        return Refusal(f"{padded.name} does not pad the tokens alone", padded)
    for node in match.values["between"]:
        if not is_view(node):
            return Refusal(f"{node.name} cuts the sums", node)
    by_entry = axis == 2 and statically_known_true(sizes[0] == B)
    if not (by_entry or statically_known_true(B == 1) or statically_known_true(T % CHUNK == 0)):
        return Refusal(f"the chunks of {cumsum.name} may reach into the next batch entry")
    if not statically_known_true(value(g).numel() == value(y).numel()):
        return Refusal(f"{g.name} has another length", g)
    if value(cumsum).dtype != accumulation_dtype(value(g)):
        return Refusal(f"the sum of {value(g).dtype} is in {value(cumsum).dtype}")
    return None


def only_tokens_padded(padded: fx.Node, y: fx.Node, B: Any, T: Any) -> bool:
    """Whether zeros behind the last token are all that was added, and are what was cut off."""
    x, pads, *fill = padded.args
    rank = value(x).dim()
    behind = 2 * (rank - 2) + 1  # pads come from the last axis on, before and behind each
    others = all(type(n) is int and n == 0 for i, n in enumerate(pads) if i != behind)
    axis, start = (*y.args[1:3], 0, 0)[:2] if len(y.args) > 1 else (0, 0)
    step = y.args[4] if len(y.args) > 4 else 1
    return (
        rank > 2
        and others
        and (not fill or fill[0] == 0)
        and same_shape(value(x).shape[:2], (B, T))
        and same_shape(value(y).shape[:2], (B, T))
        and (axis, start or 0, step) == (1, 0, 1)
    )


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    g, y, scale, shape = (match.values[name] for name in ("g", "y", "scale", "shape"))
    g = reshape(graph, g, shape)
    sums = compute(graph, chunk_cumsum_op, g, CHUNK, scale, None, None)
    return {y: reshape(graph, sums, value(y).shape)}


register(
    "plain_cumsum",
    (aten.cumsum.default,),
    pattern,
    guard,
    replacement,
    stages=(BEFORE_AUTOGRAD, POST_GRAD),
)
