"""Norms in plain PyTorch, however they are written: `x / sqrt(reduction of x * x + eps)`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kda_ops.lowering.graph.matching import (
    between_floats,
    is_view,
    only_user,
    same_shape,
    strip_casts,
    structurally_equal,
    times_one,
    value,
)

aten = torch.ops.aten
NOT_A_NUMBER = "not a number (torch.compile(dynamic=True) makes tensors of Python floats)"


@dataclass(frozen=True)
class Normed:
    """`x / sqrt(r + eps)` in plain PyTorch, where `r` is reduced from `x * x` along the last axis.

    Attributes:
        inner: Its nodes, from the square on, the last one is the quotient.
        x: The tensor, as it is squared.
        eps: What is added; a number, or a node.
    """

    inner: list[fx.Node]
    x: fx.Node
    eps: Any

    @property
    def y(self) -> fx.Node:
        return self.inner[-1]


def normed(reduction: fx.Node) -> Normed | None:
    """The norm that a reduction belongs to, however its root is written."""
    x = squared(reduction.args[0])
    rank = 0 if x is None else value(x).dim()
    axes: Any = reduction.args[1] if len(reduction.args) > 1 else None
    if x is None or not rank or axes is None or [axis % rank for axis in axes] != [rank - 1]:
        return None
    path: list[fx.Node] = [reduction.args[0], reduction]
    eps, exponent = None, 1.0
    while (user := only_user(path[-1])) is not None:
        if eps is None and user.target in (aten.add.Tensor, aten.add.Scalar) and not user.kwargs:
            eps = user.args[1]
        elif eps is not None and (power := power_of(user)) is not None:
            exponent *= power
        elif not (is_view(user) or times_one(user) or between_floats(user)):
            break
        path.append(user)
    if (
        user is None
        or eps is None
        or not same_shape(value(path[-1]).shape, (*value(x).shape[:-1], 1))
    ):
        return None
    numerator = scaled_by(user, path[-1], exponent)
    if numerator is None or not structurally_equal(strip_casts(numerator), strip_casts(x)):
        return None
    return Normed([*path, user], x, eps)


def clamped(reduction: fx.Node) -> Normed | None:
    """The norm that `F.normalize` is: nearly one, with the larger of root and eps below."""
    path: list[Any] = [reduction.args[0], reduction]
    x, eps = squared(path[0]), None
    while x is not None and (user := only_user(path[-1])) is not None:
        path.append(user)
        if user.target is aten.clamp_min.default:
            eps = user.args[1]
        elif user.target is aten.div.Tensor and eps is not None:
            return Normed(path, x, eps)
        elif not (
            power_of(user) == 0.5 or user.target is aten.expand.default or between_floats(user)
        ):
            return None
    return None


def squared(node: Any) -> fx.Node | None:
    """The tensor that a node is the square of."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    if node.target is aten.mul.Tensor and isinstance(node.args[0], fx.Node):
        return node.args[0] if structurally_equal(*node.args) else None
    square = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    return node.args[0] if square else None


def power_of(node: fx.Node) -> float | None:
    """The exponent of a root, a reciprocal or another power."""
    if node.target is aten.pow.Tensor_Scalar:
        return float(node.args[1])
    roots = {aten.rsqrt.default: -0.5, aten.sqrt.default: 0.5, aten.reciprocal.default: -1.0}
    return roots.get(node.target)


def scaled_by(y: fx.Node, root: fx.Node, exponent: float) -> Any:
    """The `x` of `y = x * root`, of `x / root` if the root is no inverse."""
    if y.target is aten.mul.Tensor and exponent == -0.5:
        x = y.args[1] if y.args[0] is root else y.args[0]
    elif y.target is aten.div.Tensor and exponent == 0.5 and y.args[1] is root:
        x = y.args[0]
    else:
        return None
    return x if isinstance(x, fx.Node) and x is not root else None
