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
    between_floats,
    moved,
    narrow,
    only_user,
    origin,
    value,
)
from kda_ops.lowering.rewrites.framework import Found, register
from kda_ops.lowering.rewrites.patterns.norms import NOT_A_NUMBER, clamped, normed
from kda_ops.norm.l2norm.op import l2norm_op

aten = torch.ops.aten


def pattern(node: fx.Node) -> Found | None:
    norm, clamps = normed(node), False
    if norm is None:
        norm, clamps = clamped(node), True
    if norm is None:
        return None
    # a norm in fp32 that ends in the dtype it started from is the operator on the narrow input
    y, inner, before = norm.y, norm.inner, narrow(norm.x)
    cast = only_user(y) if value(y).dtype != value(before).dtype else None
    if cast is not None and between_floats(cast) and value(cast).dtype == value(before).dtype:
        y, inner = cast, [*inner, cast]
    source = before if value(y).dtype == value(before).dtype else norm.x
    if not (cut_from_operator(source) or goes_into_operator(y)):
        return None
    return Found(inner, [y], [source], {"x": source, "eps": norm.eps, "y": y, "clamps": clamps})


def cut_from_operator(x: fx.Node) -> bool:
    """Whether x is a part of what an operator of this package returns."""
    for _ in range(3):
        x, _ = origin(x)
        if Call.of(x) is not None:
            return True
        if x.op != "call_function" or not x.args or not isinstance(x.args[0], fx.Node):
            return False
        x = x.args[0]
    return Call.of(origin(x)[0]) is not None


def goes_into_operator(y: fx.Node) -> bool:
    return any(Call.of(user) is not None for user in moved(y)[-1].users)


def guard(found: Found) -> str | None:
    eps, x, y = (found.values[name] for name in ("eps", "x", "y"))
    if found.values["clamps"]:
        return f"{y.name} divides by the larger of root and eps, eps belongs below the root"
    if not isinstance(eps, float) or eps < 0:
        return f"eps is {eps}, {NOT_A_NUMBER}"
    if value(x).dtype != value(y).dtype:
        return f"the norm of {value(x).dtype} is in {value(y).dtype}"
    return None


def replacement(graph: fx.Graph, found: Found) -> dict[fx.Node, fx.Node]:
    x, eps, y = (found.values[name] for name in ("x", "eps", "y"))
    return {y: compute(graph, l2norm_op, x, eps)}


register("plain_l2norm", (aten.sum.dim_IntList,), pattern, guard, replacement)
