"""Queries and keys repeated for the value heads are taken as they were before.

    repeat(q), repeat(k) -> recurrence(q, k, v, ...)
    recurrence(q, k, v, ...)                         a norm may come before or behind the repetition

Value head i of a recurrence uses key head `i // (HV // H)`, which is what `repeat_interleave` along
the heads is for. Repeated, they go through memory once for each value head, and are no queries and
keys of a convolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.lowering.graph.emitting import compute, emit, reshape
from kda_ops.lowering.graph.matching import Call, Refusal, same_shape, strip_views, value
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, POST_GRAD, Match, register
from kda_ops.norm.l2norm.op import l2norm_op

aten = torch.ops.aten
ANCHORS = (chunk_kda_op, chunk_kda_state_op, recurrent_kda_op)


@dataclass(frozen=True)
class Repeated:
    """Heads that are each repeated.

    Attributes:
        inner: The nodes, from the repetition on.
        source: `[..., H, 1, K]`, before it.
        heads: H.
        norm: The `Call` of `l2norm` behind it, or None.
    """

    inner: list[fx.Node]
    source: fx.Node
    heads: Any
    norm: Call | None


def repeated(x: fx.Node) -> Repeated | None:
    """What `x [B, T, H * n, K]` is the repetition of, if it is one."""
    node, inner = strip_views(x)
    norm = Call.of(node)
    if norm is not None and norm.op is l2norm_op:
        node, path = strip_views(norm.args["x"])
        inner = [*path, norm.node, *inner]
    else:
        norm = None
    if getattr(node, "target", None) is not aten.expand.default:
        return None
    source: Any = node.args[0]
    shape, wide = value(source).shape, value(node).shape
    if len(shape) < 3 or not same_shape((*shape[:-2], 1, shape[-1]), shape):
        return None
    if not same_shape((*wide[:-2], wide[-1]), (*shape[:-2], shape[-1])):
        return None
    if not same_shape(value(x).shape[-2:], (shape[-3] * wide[-2], shape[-1])):
        return None
    if norm is not None and not same_shape(value(norm.node).shape[-1:], shape[-1:]):
        return None
    return Repeated([node, *inner], source, shape[-3], norm)


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    q, k = repeated(call.args["q"]), repeated(call.args["k"])
    if q is None and k is None:
        return None
    heads = [x for x in (q, k) if x is not None]
    inner = [*(n for x in heads for n in x.inner), *call.nodes()]
    outputs = [n for n in call.nodes() if n is not node]
    inputs = [*call.inputs("q", "k"), *(x.source for x in heads)]
    return Match(inner, outputs, inputs, {"call": call, "q": q, "k": k})


def guard(match: Match) -> Refusal | None:
    q, k = match.values["q"], match.values["k"]
    for name, x in (("q", q), ("k", k)):
        if x is None:
            return Refusal(f"{name} is not repeated")
    if not same_shape([q.heads], [k.heads]):
        return Refusal(f"q has {q.heads} heads before it is repeated, k {k.heads}")
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    call = match.values["call"]
    args = dict(call.args)
    for name in "qk":
        x = match.values[name]
        B, T, _, K = value(args[name]).shape
        args[name] = reshape(graph, x.source, (B, T, x.heads, K))
        if x.norm is not None:
            args[name] = compute(graph, l2norm_op, args[name], x.norm.args["eps"])
    news, states = emit(graph, call.op, args, call)
    olds = [call.result(i) for i in range(call.results)]
    return {old: new for old, new in zip(olds, news, strict=True) if old is not None} | states


register(
    "repeated_heads", ANCHORS, pattern, guard, replacement, stages=(BEFORE_AUTOGRAD, POST_GRAD)
)
