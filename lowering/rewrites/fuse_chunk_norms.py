"""The chunked recurrence from raw inputs takes the norms of q and k.

    chunk_kda_gated(l2norm(q), l2norm(k), ...)
    chunk_kda_gated(q, k, ..., qk_norm_eps)

On an H200 at T = 8192, H = 32 `prepare` takes 5 to 10 us more with the norms, a convolution 16, and
kernels of their own take 67: so this comes before `fuse_short_conv_qkv`, which has the norms that
are left. Only where `prepare` is one kernel: the other sizes would write normalised q and k to
memory too.
"""

from typing import Any

from torch import fx

from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from kda_ops.delta_rule.chunked.workspace import has_fast_prepare
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import Call, Refusal, same_shape, strip_views, value
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.norm.l2norm.op import l2norm_op

Norms = dict[str, tuple[Call, list[fx.Node]]]  # of q and k, with the views behind each


def norms_under(call: Call) -> Norms | None:
    """The norms that q and k of a chunked recurrence are, where it takes them."""
    q, v = (value(call.args[name]) for name in "qv")
    if not has_fast_prepare(q.dtype, q.shape[3], v.shape[3]):
        return None
    norms = {}
    for name in "qk":
        source, path = strip_views(call.args[name])
        norm = Call.of(source)
        if norm is None or norm.op is not l2norm_op:
            return None
        norms[name] = (norm, path)
    return norms


def different_norms(call: Call, norms: Norms) -> Refusal | None:
    """Why norms are not those that the recurrence has."""
    eps = [norm.args["eps"] for norm, _ in norms.values()]
    if eps[0] != eps[1]:
        return Refusal(f"q and k have different eps: {eps[0]} and {eps[1]}")
    for name, (norm, _) in norms.items():
        if not same_shape(value(norm.node).shape[-1:], value(call.args[name]).shape[-1:]):
            return Refusal(f"{norm.node.name} is not over heads", norm.node)
    return None


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    if call.args["qk_norm_eps"] is not None or (norms := norms_under(call)) is None:
        return None
    inner = [n for norm, path in norms.values() for n in (norm.node, *path)]
    outputs = [n for n in call.nodes() if n is not node]
    inputs = [*call.inputs("q", "k"), *(norm.args["x"] for norm, _ in norms.values())]
    return Match([*inner, *call.nodes()], outputs, inputs, {"call": call, "norms": norms})


def guard(match: Match) -> Refusal | None:
    return different_norms(match.values["call"], match.values["norms"])


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    call, norms = match.values["call"], match.values["norms"]
    args = {**call.args, "qk_norm_eps": norms["q"][0].args["eps"]}
    for name, (norm, _) in norms.items():
        args[name] = reshape(graph, norm.args["x"], value(call.args[name]).shape)
    news, states = emit(graph, call.op, args, call)
    olds = [call.result(i) for i in range(call.results)]
    return {old: new for old, new in zip(olds, news, strict=True) if old is not None} | states


register("chunk_norms", (chunk_kda_gated_op, chunk_kda_gated_state_op), pattern, guard, replacement)
