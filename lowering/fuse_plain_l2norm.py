"""An L2 norm in plain PyTorch next to an operator is the operator.

x * rsqrt(sum(x * x, -1) + eps)
x / sqrt(sum(x * x, -1) + eps)
l2norm(x)                                      both also in fp32 and cast back
"""

from typing import Any

import torch
from torch import fx

from kda_ops.l2norm.op import l2norm_op
from lowering.emitting import compute
from lowering.matching import Call, moved, only_user, origin, value
from lowering.rewrite import Found, register

aten, prims = torch.ops.aten, torch.ops.prims
NOT_A_NUMBER = "not a number (torch.compile(dynamic=True) makes tensors of Python floats)"


def pattern(node: fx.Node) -> Found | None:
    x: Any = squared(node.args[0])
    rank = 0 if x is None else value(x).dim()
    keepdim = len(node.args) > 2 and node.args[2]
    if not rank or not keepdim or [axis % rank for axis in node.args[1]] != [rank - 1]:
        return None
    add = only_user(node)
    if add is None or add.target not in (aten.add.Tensor, aten.add.Scalar) or add.kwargs:
        return None
    root = only_user(add)
    if root is None or root.target not in (aten.rsqrt.default, aten.sqrt.default):
        return None
    y: Any = only_user(root)
    inverse = root.target is aten.rsqrt.default
    if y is None or not scales(y, x, root, inverse):
        return None
    inner = [node.args[0], node, add, root, y]
    # a norm in fp32 that ends in the dtype it started from is the operator on the narrow input
    source, cast = x, only_user(y)
    if cast is not None and cast.target is prims.convert_element_type.default:
        narrow = x.args[0] if x.target is prims.convert_element_type.default else x
        if value(cast).dtype == value(narrow).dtype and value(x).dtype == torch.float32:
            source, y = narrow, cast
            inner += [cast]
    if not (cut_from_operator(source) or goes_into_operator(y)):
        return None
    return Found(inner, [y], [source], {"x": source, "eps": add.args[1], "y": y})


def squared(node: Any) -> fx.Node | None:
    """The tensor that a node is the square of."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return node.args[0]
    return node.args[0] if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2 else None


def scales(y: fx.Node, x: fx.Node, root: fx.Node, inverse: bool) -> bool:
    """Whether `y` is `x * root`, or `x / root` if the root is no inverse."""
    if inverse:
        return y.target is aten.mul.Tensor and y.args in ((x, root), (root, x))
    return y.target is aten.div.Tensor and y.args == (x, root)


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
    if not isinstance(eps, float) or eps < 0:
        return f"eps is {eps}, {NOT_A_NUMBER}"
    if value(x).dtype != value(y).dtype:
        return f"the norm of {value(x).dtype} is in {value(y).dtype}"
    return None


def replacement(graph: fx.Graph, found: Found) -> dict[fx.Node, fx.Node]:
    x, eps, y = (found.values[name] for name in ("x", "eps", "y"))
    return {y: compute(graph, l2norm_op, x, eps)}


register("plain_l2norm", (aten.sum.dim_IntList,), pattern, guard, replacement)
