"""In training, separate short convolutions of q, k and v are one of all channels.

    short_conv(q, w), short_conv(k, u), short_conv(v, x)
    split(short_conv(cat([q, k, v]), cat([w, u, x])))

The projections then write side by side (`packed_projection`), and one kernel each way convolves all
of them. Only the taps are copied, some kilobytes. Without gradients `separate_convs` reads
everything where it lies, which has no gradient kernel.
"""

import operator
from typing import Any

import torch
from torch import fx

from kda_ops.conv.short_conv.op import short_conv_op
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.lowering.graph.emitting import compute
from kda_ops.lowering.graph.matching import Call, Refusal, value
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, Match, register
from kda_ops.lowering.rewrites.patterns.heads import PER_PART, convolutions_under, unlike

aten = torch.ops.aten
ANCHORS = (chunk_kda_op, chunk_kda_gated_op)


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    convs = convolutions_under(call, (short_conv_op,))
    if len(convs) != 3:
        return None
    outputs = [conv.node for conv in convs]
    return Match(outputs, outputs, [n for conv in convs for n in conv.inputs()], {"convs": convs})


def guard(match: Match) -> Refusal | None:
    return unlike(match.values["convs"])


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    convs = match.values["convs"]
    args = dict(convs[0].args)
    for name, axis in zip(PER_PART, (-1, 0, 0), strict=False):
        parts = [conv.args[name] for conv in convs]
        if parts[0] is not None:
            args[name] = compute(graph, aten.cat.default, parts, axis)
    y = compute(graph, short_conv_op, *args.values())
    widths = [value(conv.node).shape[-1] for conv in convs]
    split = compute(graph, aten.split_with_sizes.default, y, widths, -1)
    return {conv.node: compute(graph, operator.getitem, split, i) for i, conv in enumerate(convs)}


register("training_convs", ANCHORS, pattern, guard, replacement, stages=(BEFORE_AUTOGRAD,))
