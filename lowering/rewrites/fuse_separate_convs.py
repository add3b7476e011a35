"""Separate short convolutions of q, k and v, as in the layers of FLA and Moonshot, are one kernel.

    q, k = l2norm(short_conv(q)), l2norm(short_conv(k));  v = short_conv(v);  chunk_kda(q, k, v)
    q, k, v = short_conv_qkv((q, k, v));                                      chunk_kda(q, k, v)

Inputs, weights and states stay where they are, three tensors each: the kernel takes a pointer to
each of them. So it does not matter whether the inputs are projections of their own or slices of
one, and nothing is packed at run time. `fuse_kda_decode` does the same in a decode step.
"""

from typing import Any

from torch import fx

from kda_ops.conv.short_conv.op import short_conv_op, short_conv_state_op
from kda_ops.conv.short_conv_qkv.op import (
    short_conv_qkv_unpacked_op,
    short_conv_qkv_unpacked_state_op,
)
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import Call, Refusal, value
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.heads import (
    convolutions_under,
    renamed,
    separate_heads,
    unlike,
    unpacked_args,
)

FUSED = {
    short_conv_op: short_conv_qkv_unpacked_op,
    short_conv_state_op: short_conv_qkv_unpacked_state_op,
}
ANCHORS = (chunk_kda_op, chunk_kda_state_op, recurrent_kda_op)


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    convs = convolutions_under(call, tuple(FUSED))
    heads = separate_heads(convs) if len(convs) == 3 else None
    if heads is None:
        return None
    states = [new for conv in convs for _, new in conv.new_bases()]
    outputs = [*[norm.node for norm in heads.norms if norm], heads.parts[2], *states]
    inputs = [n for conv in convs for n in conv.inputs() if n not in states]
    return Match(heads.inner, outputs, inputs, {"convs": convs, "heads": heads})


def guard(match: Match) -> Refusal | None:
    return match.values["heads"].guard() or unlike(match.values["convs"])


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    convs, heads = match.values["convs"], match.values["heads"]
    args = unpacked_args(convs)
    for name in "qkv":
        x = args[name]
        shape = value(x).shape
        args[name] = x if len(shape) == 3 else reshape(graph, x, (1, *shape))
    args |= {"head_dim": heads.head_dim, "norm_eps": heads.norm_eps}
    news, states = emit(graph, FUSED[convs[0].op], args, *renamed(convs))
    olds = [heads.norms[0].node, heads.norms[1].node, heads.parts[2]]
    pairs = zip(olds, news, strict=True)
    return {old: reshape(graph, new, value(old).shape) for old, new in pairs} | states


register("separate_convs", ANCHORS, pattern, guard, replacement)
