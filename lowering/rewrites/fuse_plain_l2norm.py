"""An L2 norm in plain PyTorch next to an operator is the operator.

x * rsqrt(sum(x * x, -1) + eps)
x / sqrt(sum(x * x, -1) + eps)
l2norm(x)                                      both also in fp32 and cast back
"""

import torch
from torch import fx

from kda_ops.lowering.graph.emitting import compute
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    between_floats,
    follow_views,
    only_user,
    strip_casts,
    strip_views,
    value,
)
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, POST_GRAD, Match, register
from kda_ops.lowering.rewrites.patterns.norms import NOT_A_NUMBER, clamped, normed
from kda_ops.norm.l2norm.op import l2norm_op

aten = torch.ops.aten


def pattern(node: fx.Node) -> Match | None:
    norm, clamps = normed(node), False
    if norm is None:
        norm, clamps = clamped(node), True
    if norm is None:
        return None
    # a norm in fp32 that ends in the dtype it started from is the operator on the narrow input
    y, inner, before = norm.y, norm.inner, strip_casts(norm.x)
    cast = only_user(y) if value(y).dtype != value(before).dtype else None
    if cast is not None and between_floats(cast) and value(cast).dtype == value(before).dtype:
        y, inner = cast, [*inner, cast]
    source = before if value(y).dtype == value(before).dtype else norm.x
    if not (cut_from_operator(source) or goes_into_operator(y)):
        return None
    return Match(inner, [y], [source], {"x": source, "eps": norm.eps, "y": y, "clamps": clamps})


def cut_from_operator(x: fx.Node) -> bool:
    """Whether x is a part of what an operator of this package returns."""
    for _ in range(3):
        x, _ = strip_views(x)
        if Call.of(x) is not None:
            return True
        if x.op != "call_function" or not x.args or not isinstance(x.args[0], fx.Node):
            return False
        x = x.args[0]
    return Call.of(strip_views(x)[0]) is not None


def goes_into_operator(y: fx.Node) -> bool:
    return any(Call.of(user) is not None for user in follow_views(y)[-1].users)


def guard(match: Match) -> Refusal | None:
    eps, x, y = (match.values[name] for name in ("eps", "x", "y"))
    if match.values["clamps"]:
        return Refusal(
            f"{y.name} divides by the larger of root and eps, eps belongs below the root", y
        )
    if not isinstance(eps, float) or eps < 0:
        return Refusal(f"eps is {eps}, {NOT_A_NUMBER}")
    if value(x).dtype != value(y).dtype:
        return Refusal(f"the norm of {value(x).dtype} is in {value(y).dtype}")
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    x, eps, y = (match.values[name] for name in ("x", "eps", "y"))
    return {y: compute(graph, l2norm_op, x, eps)}


register(
    "plain_l2norm",
    (aten.sum.dim_IntList,),
    pattern,
    guard,
    replacement,
    stages=(BEFORE_AUTOGRAD, POST_GRAD),
)
