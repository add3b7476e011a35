"""The gated RMSNorm of a recurrence's output, written in plain PyTorch, is the operator.

    x * rsqrt(mean(x * x, -1) + eps) * weight * sigmoid(gate)          in any order, with casts
    rms_norm_gated(x, gate, weight, eps)

In generated code the two are one kernel either way; the operator is what a decode step is found by.
"""

import operator
from typing import Any

import torch
from torch import fx

from kda_ops.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.recurrent_kda.op import recurrent_kda_op
from kda_ops.rms_norm_gated.op import rms_norm_gated_op
from lowering.emitting import compute, reshape
from lowering.fuse_plain_l2norm import NOT_A_NUMBER, scales, squared
from lowering.matching import Call, only_user, same_shape, value, wide_origin
from lowering.rewrite import Found, register

aten, prims = torch.ops.aten, torch.ops.prims
RECURRENCES = (chunk_kda_op, chunk_kda_state_op, recurrent_kda_op)


def pattern(node: fx.Node) -> Found | None:
    x: Any = squared(node.args[0])
    rank = 0 if x is None else value(x).dim()
    keepdim = len(node.args) > 2 and node.args[2]
    if not rank or not keepdim or [axis % rank for axis in node.args[1]] != [rank - 1]:
        return None
    result, _ = wide_origin(x)
    call = Call.of(result.args[0] if result.target is operator.getitem else result)
    add = only_user(node)
    if call is None or call.op not in RECURRENCES or add is None:
        return None
    root = only_user(add)
    if add.target not in (aten.add.Tensor, aten.add.Scalar) or add.kwargs or root is None:
        return None
    y: Any = only_user(root)
    if root.target is not aten.rsqrt.default or y is None or not scales(y, x, root, True):
        return None
    o = x.args[0] if x.target is prims.convert_element_type.default else x
    found: dict[str, Any] = {"o": o, "eps": add.args[1]}
    inner = [node.args[0], node, add, root, y]
    while len(found) < 4 or value(y).dtype != value(o).dtype:
        user = only_user(y)
        if user is None:
            break
        if user.target is aten.mul.Tensor:
            other = user.args[1] if user.args[0] is y else user.args[0]
            if not isinstance(other, fx.Node):
                break
            factor, path = wide_origin(other)
            if factor.target is aten.sigmoid.default and "gate" not in found:
                found["gate"], _ = wide_origin(factor.args[0])
                inner += [factor, *path]
            elif "weight" not in found and along_last(other, factor, o):
                found["weight"] = factor
            else:
                break
        elif user.target is not prims.convert_element_type.default:
            break
        inner.append(user)
        y = user
    if len(found) < 4:
        return None
    inputs = [found[name] for name in ("o", "gate", "weight")]
    return Found(inner, [y], inputs, found | {"y": y})


def along_last(x: fx.Node, weight: fx.Node, o: fx.Node) -> bool:
    """Whether `x`, which is `weight` in some shape, has an element per channel of `o`."""
    V = value(o).shape[-1:]
    return same_shape(value(weight).shape, V) and same_shape(value(x).shape[-1:], V)


def guard(found: Found) -> str | None:
    o, gate, y, eps = (found.values[name] for name in ("o", "gate", "y", "eps"))
    if not isinstance(eps, float) or eps < 0:
        return f"eps is {eps}, {NOT_A_NUMBER}"
    if value(o).dtype != value(y).dtype:
        return f"the norm of {value(o).dtype} is in {value(y).dtype}"
    numbers = [value(gate).numel(), *value(y).shape]
    if not same_shape(numbers, [value(o).numel(), *value(o).shape]):
        return "the gate has another shape"
    return None


def replacement(graph: fx.Graph, found: Found) -> dict[fx.Node, fx.Node]:
    o, gate, weight, eps, y = (found.values[n] for n in ("o", "gate", "weight", "eps", "y"))
    gate = reshape(graph, gate, value(o).shape)
    return {y: compute(graph, rms_norm_gated_op, o, gate, weight, eps)}


register("plain_rms_norm_gated", (aten.mean.dim,), pattern, guard, replacement)
