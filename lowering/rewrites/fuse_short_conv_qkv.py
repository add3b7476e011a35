"""The short convolution with the norms of queries and keys is one kernel.

    short_conv(x) -> views -> split -> views -> l2norm(q), l2norm(k), v
    short_conv_qkv(x)

The convolved queries and keys are not written and read again, and the three parts come out dense.
Where the recurrence takes the norms there are none left (`fuse_chunk_norms`).
"""

from typing import Any

from torch import fx

from kda_ops.conv.short_conv.op import short_conv_op, short_conv_state_op
from kda_ops.conv.short_conv_qkv.op import short_conv_qkv_op, short_conv_qkv_state_op
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import Call, Refusal, value
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.heads import heads_of

FUSED = {short_conv_op: short_conv_qkv_op, short_conv_state_op: short_conv_qkv_state_op}


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    y = call.result()
    heads = None if y is None else heads_of(y)
    if heads is None or heads.norms == [None, None]:
        return None
    states = [new for _, new in call.new_bases()]
    outputs = [*[norm.node for norm in heads.norms if norm], heads.parts[2], *states]
    inner = [*call.nodes(), *heads.inner]
    return Match(inner, outputs, call.inputs(), {"conv": call, "heads": heads})


def guard(match: Match) -> Refusal | None:
    return match.values["heads"].guard()


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    conv, heads = match.values["conv"], match.values["heads"]
    x = conv.args["x"]
    T, D = value(x).shape[-2:]
    args = {
        **conv.args,
        "x": x if value(x).dim() == 3 else reshape(graph, x, (1, T, D)),
        "key_dim": heads.key_dim,
        "head_dim": heads.head_dim,
        "norm_eps": heads.norm_eps,
    }
    news, states = emit(graph, FUSED[conv.op], args, conv)
    olds = [heads.norms[0].node, heads.norms[1].node, heads.parts[2]]
    pairs = zip(olds, news, strict=True)
    return {old: reshape(graph, new, value(old).shape) for old, new in pairs} | states


register("short_conv_qkv", tuple(FUSED), pattern, guard, replacement)
