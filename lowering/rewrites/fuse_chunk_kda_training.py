"""In training graphs the chunked recurrence runs from raw inputs, with a gradient of its own.

    chunk_kda(l2norm(q), l2norm(k), v, gate_cumsum(x, ...), beta_scale * sigmoid(beta))
    chunk_kda_backward(...) -> l2norm_backward, gate_cumsum_backward, that of the sigmoid

    chunk_kda_gated(q, k, v, x, beta, ...)
    chunk_kda_gated_backward(q, k, v, x, beta, ...)

It matches the joint graph, before it is partitioned: after that the forward graph returns
normalized q and k, the cumulative gate and beta, and nothing can replace them. Raw inputs are saved
instead.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from kda_ops._gradients import Signature
from kda_ops._registry import backward_of
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.gating.gate.op import gate_op
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    forward_of,
    is_view,
    only_user,
    strip_casts,
    value,
)
from kda_ops.lowering.rewrites import fuse_chunk_kda_gated, fuse_chunk_norms
from kda_ops.lowering.rewrites.framework import JOINT, Match, describe, place, register
from kda_ops.norm.l2norm.op import l2norm_op

aten, prims = torch.ops.aten, torch.ops.prims
NAME = "chunk_kda_training"
RESULTS = ("output_gradient_0", "output_gradient_1")


BACKWARD, FUSED_BACKWARD = backward_of(chunk_kda_op), backward_of(chunk_kda_gated_op)
CALLS = {backward_of(op): op for op in (chunk_cumsum_op, gate_op, gate_cumsum_op, l2norm_op)}


@dataclass
class Gradients:
    """What becomes of the gradients that `chunk_kda_backward` returns.

    Attributes:
        inner: The nodes that are replaced.
        ends: The gradients of the raw inputs, by the arguments of the fused operator.
        refusal: Why one of them is not what it should be, or None.
    """

    inner: list[fx.Node] = field(default_factory=list)
    ends: dict[str, fx.Node] = field(default_factory=dict)
    refusal: Refusal | None = None


def gradient(call: Call, name: str) -> fx.Node | None:
    """The node of the gradient of an argument, None if nothing uses it."""
    signature = Signature(CALLS.get(call.op, chunk_kda_op))
    place = signature.arguments.index(name)
    if not call.args["needs_gradient"][place]:
        return None
    found = call.result(signature.wanted.index(place))
    return found if found is not None and found.users else None


def past_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a value is, after views that are its only uses, and the nodes from there on."""
    path = [node]
    while (user := only_user(path[-1])) is not None and is_view(user):
        path.append(user)
    return path[-1], path


def derivative_of(node: fx.Node, of: Call) -> tuple[Call, list[fx.Node]] | None:
    """The gradient of the call `of` that the gradient `node` of its result goes to alone."""
    end, path = past_views(node)
    user = only_user(end)
    call = Call.of(user)
    if call is None or CALLS.get(call.op) is not of.op:
        return None
    if call.args["output_gradient_0"] is not end:
        return None
    if any(call.args[name] is not x and call.args[name] != x for name, x in of.args.items()):
        return None
    return call, [*path, *call.nodes()]


def pattern(node: fx.Node) -> Match | None:
    backward: Any = Call.of(node)
    forward = forward_of(backward, chunk_kda_op)
    if forward is None:
        return None
    match = fuse_chunk_kda_gated.pattern(forward.node)
    if match is None:
        return None
    norms = fuse_chunk_norms.norms_under(forward)
    found = Gradients()
    follow_gate(found, backward, match.values["gate"].inner)
    follow_beta(found, backward, match.values["beta"])
    for name in "qkv":
        follow(found, backward, name, None if norms is None or name == "v" else norms[name])
    follow(found, backward, "initial_state", None)
    inner = [*match.inner]
    inputs = [n for n in match.inputs]
    for norm, path in (norms or {}).values():
        inner += [norm.node, *path]
        inputs.append(norm.args["x"])
    if norms is not None:
        inputs = [n for n in inputs if n not in inner]
    later = [*found.inner, *backward.nodes()]
    given = [x for name in RESULTS if isinstance(x := backward.args[name], fx.Node)]
    parts = (
        Match(inner, match.outputs, inputs),
        Match(later, list(found.ends.values()), given),
    )
    values = {**match.values, "norms": norms, "found": found, "backward": backward}
    outputs = [*match.outputs, *found.ends.values()]
    return Match([*inner, *later], outputs, [*inputs, *given], values, parts, forward.node)


def follow(
    found: Gradients, backward: Call, name: str, norm: tuple[Call, list[fx.Node]] | None
) -> None:
    """The gradient of q, k, v or the state, through the norm if that is taken in."""
    start = gradient(backward, name)
    if start is None:
        return
    if norm is None:
        found.ends[name] = start
        return
    next_one = derivative_of(start, norm[0])
    if next_one is None:
        found.refusal = Refusal(f"the gradient of {norm[0].node.name} is used elsewhere", start)
        return
    found.inner += next_one[1]
    found.ends[name] = next_one[0].node


def follow_gate(found: Gradients, backward: Call, inner: list[fx.Node]) -> None:
    """The gradients of the raw gate, A_log and dt_bias."""
    start = gradient(backward, "g_cumsum")
    calls = [call for node in reversed(inner) if (call := Call.of(node)) is not None]
    if start is None:
        return
    for call in calls:
        next_one = derivative_of(start, call)
        if next_one is None:
            found.refusal = Refusal(f"the gradient of {call.node.name} is used elsewhere", start)
            return
        found.inner += next_one[1]
        last, name = next_one[0], "g" if call.op is chunk_cumsum_op else "raw_gate"
        start = gradient(last, name) if call.op is chunk_cumsum_op else start
        if start is None:
            return
    for name in ("raw_gate", "A_log", "dt_bias"):
        if (end := gradient(last, name)) is not None:
            found.ends[name] = end


def follow_beta(found: Gradients, backward: Call, beta: Any) -> None:
    """The gradient of the raw beta: times the factor and s (1 - s), and rounded as the raw beta."""
    start = gradient(backward, "beta")
    if start is None or beta is None:
        return
    raw, factor, made = beta
    sigmoid = next((n for n in made if n.target is aten.sigmoid.default), None)
    node, slope = start, None
    found.inner.append(start)
    while slope is None or value(node).dtype != value(raw).dtype:
        user = only_user(node)
        if user is None:
            break
        if user.target is aten.mul.Tensor and (nodes := slope_of(user, node, sigmoid)):
            slope = nodes[0]
            found.inner += nodes
        elif user.target is aten.mul.Tensor and user.args[1] == factor != 1:
            factor = 1.0
        elif not is_view(user) and user.target is not prims.convert_element_type.default:
            break
        node = user
        found.inner.append(node)
    if slope is None or factor != 1 or value(node).dtype != value(raw).dtype:
        found.refusal = Refusal("the gradient of beta is not that of its sigmoid alone", start)
        return
    found.ends["raw_beta"] = node


def slope_of(product: fx.Node, x: fx.Node, s: fx.Node | None) -> list[fx.Node]:
    """The nodes from a sigmoid `s` to its slope `s (1 - s)`, if a product is that of `x` and the
    slope; the slope comes first.
    """
    slope: Any = product.args[1] if product.args[0] is x else product.args[0]
    if s is None or not isinstance(slope, fx.Node) or slope.target is not aten.mul.Tensor:
        return []
    rest: Any = next((n for n in slope.all_input_nodes if n.target is aten.sub.Tensor), None)
    if rest is None or rest.args[0] != 1 or rest.kwargs or len(slope.all_input_nodes) != 2:
        return []
    wide: Any = rest.args[1]
    if wide not in slope.args or strip_casts(wide) is not s:
        return []
    return [slope, rest] if wide is s else [slope, rest, wide]


def guard(match: Match) -> Refusal | None:
    refusal = match.values["found"].refusal or fuse_chunk_kda_gated.guard(match)
    if refusal is None and match.values["norms"] is not None:
        norms = match.values["norms"]
        refusal = fuse_chunk_norms.different_norms(match.values["call"], norms)
    return refusal


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    call, backward, norms = (match.values[name] for name in ("call", "backward", "norms"))
    ends: dict[str, fx.Node] = match.values["found"].ends
    with graph.inserting_before(call.node):
        before = call.node.prev
        args = fuse_chunk_kda_gated.fused_args(graph, match)
        if norms is not None:
            args["qk_norm_eps"] = norms["q"][0].args["eps"]
            for name, (norm, _) in norms.items():
                args[name] = reshape(graph, norm.args["x"], value(call.args[name]).shape)
        results, _ = emit(graph, chunk_kda_gated_op, args)
        made = call.node.prev
        while made is not before:
            describe(made, call.node)
            made.meta["rewrite"] = NAME
            place(made, call.node)
            made = made.prev
    signature = Signature(chunk_kda_gated_op)
    needs = [name in ends for name in signature.arguments]
    given = {name: backward.args[name] for name in RESULTS}
    gradients, _ = emit(graph, FUSED_BACKWARD, {**args, **given, "needs_gradient": needs})
    place(gradients[0].args[0], backward.node)
    names = [signature.arguments[i] for i in signature.wanted]
    olds = [call.result(i) for i in range(call.results)]
    news = {old: new for old, new in zip(olds, results, strict=True) if old is not None}
    for name, new in zip(names, gradients, strict=True):
        if name in ends:
            news[ends[name]] = reshape(graph, new, value(ends[name]).shape)
        else:
            graph.erase_node(new)
    return news


register(NAME, (BACKWARD,), pattern, guard, replacement, stages=(JOINT,))
