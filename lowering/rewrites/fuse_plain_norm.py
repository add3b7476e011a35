"""The gated RMSNorm of a recurrence's output, written in plain PyTorch, is the operator.

    x * rsqrt(mean(x * x, -1) + eps) * weight * sigmoid(gate)          in any order, with casts
    rms_norm_gated(x, gate, weight, eps)

In generated code the two are one kernel either way; the operator is what a decode step is found by.
"""

import operator
from typing import Any

import torch
from torch import fx

from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.lowering.graph.emitting import compute, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    between_floats,
    is_view,
    only_user,
    same_shape,
    strip_casts,
    strip_views_and_casts,
    value,
)
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, POST_GRAD, Match, register
from kda_ops.lowering.rewrites.patterns.gates import sigmoid_of
from kda_ops.lowering.rewrites.patterns.norms import NOT_A_NUMBER, normed
from kda_ops.norm.rms_norm_gated.op import rms_norm_gated_op

aten = torch.ops.aten
RECURRENCES = (chunk_kda_op, chunk_kda_state_op, recurrent_kda_op)


def pattern(node: fx.Node) -> Match | None:
    norm = normed(node)
    if norm is None:
        return None
    result, _ = strip_views_and_casts(norm.x)
    call = Call.of(result.args[0] if result.target is operator.getitem else result)
    if call is None or call.op not in RECURRENCES:
        return None
    o, y, inner = strip_casts(norm.x), norm.y, norm.inner
    found: dict[str, Any] = {"o": o, "eps": norm.eps}
    while len(found) < 4 or value(y).dtype != value(o).dtype:
        user = only_user(y)
        if user is None:
            break
        if user.target is aten.mul.Tensor:
            other = user.args[1] if user.args[0] is y else user.args[0]
            if not isinstance(other, fx.Node):
                break
            gate = gate_of(other) if "gate" not in found else None
            if gate is not None:
                found["gate"], nodes = gate
                inner = [*inner, *nodes]
            elif "weight" not in found and along_last(other, user, o):
                found["weight"], _ = strip_views_and_casts(other)
            else:
                break
        elif not (is_view(user) or between_floats(user)):
            break
        inner = [*inner, user]
        y = user
    if len(found) < 4:
        return None
    inputs = [found[name] for name in ("o", "gate", "weight")]
    return Match(inner, [y], inputs, found | {"y": y})


def gate_of(x: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """What a gate is the sigmoid of, and the nodes; it may be rounded to a narrower dtype."""
    factor, path = strip_views_and_casts(x)
    if between_floats(factor):
        rounded, (factor, more) = factor, strip_views_and_casts(factor.args[0])
        path = [*more, rounded, *path]
    sigmoid = sigmoid_of(factor)
    return None if sigmoid is None else (strip_views_and_casts(sigmoid[0])[0], [*sigmoid[1], *path])


def along_last(x: fx.Node, y: fx.Node, o: fx.Node) -> bool:
    """Whether `x`, a factor of `y`, has an element per channel of `o`, whatever its shape was."""
    V = value(o).shape[-1:]
    shapes = [value(strip_views_and_casts(x)[0]).shape, value(x).shape[-1:], value(y).shape[-1:]]
    return all(same_shape(shape, V) for shape in shapes)


def guard(match: Match) -> Refusal | None:
    o, gate, y, eps = (match.values[name] for name in ("o", "gate", "y", "eps"))
    if not isinstance(eps, float) or eps < 0:
        return Refusal(f"eps is {eps}, {NOT_A_NUMBER}")
    if value(o).dtype != value(y).dtype:
        return Refusal(f"the norm of {value(o).dtype} is in {value(y).dtype}")
    if not same_shape([value(x).numel() for x in (gate, y)], [value(o).numel()] * 2):
        return Refusal("the gate has another shape", gate)
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    o, gate, weight, eps, y = (match.values[n] for n in ("o", "gate", "weight", "eps", "y"))
    gate = reshape(graph, gate, value(o).shape)
    normed = compute(graph, rms_norm_gated_op, o, gate, weight, eps)
    return {y: reshape(graph, normed, value(y).shape)}


register(
    "plain_rms_norm_gated",
    (aten.mean.dim,),
    pattern,
    guard,
    replacement,
    stages=(BEFORE_AUTOGRAD, POST_GRAD),
)
