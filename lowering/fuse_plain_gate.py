"""The gate in plain PyTorch is the operator, where a recurrence or a cumsum takes it.

    -exp(A_log) * softplus(x + dt_bias)        softplus also as where(z > 20, z, log(1 + exp(z)))
    lower_bound * sigmoid(exp(A_log) * (x + dt_bias))
    gate(x, A_log, dt_bias, lower_bound)

The operator computes `log(1 + e^z)` without its cancellation below z = -17. With frozen weights the
rate `exp(A_log)`, or its negative, is a constant of the graph, and the operator gets its logarithm.
"""

import operator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kda_ops.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.formulas import accumulation_dtype
from kda_ops.gate.op import gate_op
from kda_ops.recurrent_kda.op import recurrent_kda_op
from lowering.emitting import compute, reshape
from lowering.matching import Call, same_shape, value, wide_origin
from lowering.rewrite import Found, register

aten = torch.ops.aten
THRESHOLD = 20  # of softplus: above it, it is the identity to fp32


@dataclass
class Product:
    """A product taken apart: a number, and the tensors with what leads from them to the product."""

    number: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)
    inner: list[fx.Node] = field(default_factory=list)


def product(node: fx.Node) -> Product:
    found = Product()
    pending = [node]
    while pending:
        node = pending.pop()
        source, path = wide_origin(node)
        if source.target is aten.neg.default:
            found.number = -found.number
            pending.append(source.args[0])
        elif source.target is aten.mul.Tensor:
            for x in source.args:
                if isinstance(x, fx.Node):
                    pending.append(x)
                else:
                    found.number *= x
        else:
            found.factors.append(node)
            continue
        found.inner += [source, *path]
    return found


def pattern(node: fx.Node) -> Found | None:
    call: Any = Call.of(node)
    g = call.args["g"]
    whole = product(g)
    found = softplus_gate(whole) if len(whole.factors) == 2 else bounded_gate(whole)
    if found is None or g not in whole.inner:
        return None
    z, found.values["g"] = found.values["z"], g
    add, path = wide_origin(z)
    x, bias = z, None
    if add.target is aten.add.Tensor and not add.kwargs:
        for first, second in (add.args, add.args[::-1]):
            if isinstance(second, fx.Node) and fits(second, add, value(g).shape[-2:]):
                x, bias = first, wide_origin(second)[0]
                found.inner += [add, *path]
                break
    x, _ = wide_origin(x)
    found.values |= {"x": x, "bias": bias}
    found.inner += whole.inner
    found.outputs = [g]
    found.inputs = [node for node in (x, bias, found.values["A"]) if node is not None]
    return found


def fits(bias: fx.Node, add: fx.Node, heads: torch.Size) -> bool:
    """Whether a tensor has one element per channel of each head, along the last axes of a sum."""
    count = prod(heads)
    if not statically_known_true(value(bias).numel() == count):
        return False
    axes = list(value(bias).shape)
    while len(axes) > 1 and statically_known_true(axes[0] == 1):
        axes.pop(0)
    return same_shape(axes, value(add).shape[-len(axes) :])


def softplus_gate(whole: Product) -> Found | None:
    for rate, rest in (whole.factors, whole.factors[::-1]):
        A, softplus = rate_of(rate), softplus_of(rest)
        if A is not None and softplus is not None:
            z, inner = softplus
            number = -whole.number * sign_of(A)
            return Found(inner, [], [], {"z": z, "A": A, "rate": number, "bound": None})
    return None


def bounded_gate(whole: Product) -> Found | None:
    sigmoid, path = wide_origin(whole.factors[0])
    if len(whole.factors) != 1 or sigmoid.target is not aten.sigmoid.default:
        return None
    inner = [sigmoid, *path]
    z, A, number = sigmoid.args[0], None, 1
    times, path = wide_origin(z)
    if times.target is aten.mul.Tensor:
        for rate, rest in (times.args, times.args[::-1]):
            if isinstance(rate, fx.Node) and (A := rate_of(rate)) is not None:
                z, number = rest, sign_of(A)
                inner += [times, *path]
                break
    return Found(inner, [], [], {"z": z, "A": A, "rate": number, "bound": whole.number})


def rate_of(node: fx.Node) -> fx.Node | None:
    """`A_log` of `exp(A_log)`, one per head, or the rate itself where it is a frozen constant. (The
    rate is small and may have other uses.)
    """
    exp, _ = wide_origin(node)
    if value(node).shape[-1:] != (1,):
        return None
    if exp.target is aten.exp.default:
        A, _ = wide_origin(exp.args[0])
    elif exp.op == "get_attr" and sign_of(exp):
        A = exp
    else:
        return None
    return A if same_shape(value(node).shape[-2:-1], [value(A).numel()]) else None


def frozen(node: fx.Node) -> torch.Tensor | None:
    """The constant that a node reads, None for any other node."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = operator.attrgetter(str(node.target))(node.graph.owning_module)
    real = isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor)
    return found if real and found.is_floating_point() else None


def sign_of(A: fx.Node) -> int:
    """The sign of a frozen rate, 0 where it has none; 1 for an `A_log` that is no constant."""
    rate = frozen(A)
    if rate is None:
        return 0 if A.op == "get_attr" else 1
    with unset_fake_temporarily():
        return 1 if bool((rate > 0).all()) else -1 if bool((rate < 0).all()) else 0


def logarithm(graph: fx.Graph, A: fx.Node) -> fx.Node:
    """`A_log`, of a frozen rate as a new constant."""
    rate = frozen(A)
    if rate is None:
        return A
    module: Any = graph.owning_module
    with unset_fake_temporarily():
        log = rate.detach().abs().double().log().to(accumulation_dtype(rate))
    name = f"_kda_ops_{str(A.target).replace('.', '_')}_log"
    module.register_buffer(name, log, persistent=False)
    node = graph.get_attr(name)
    node.meta["val"] = V.fake_mode.from_tensor(log, static_shapes=True)
    return node


def softplus_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The input of a softplus, and its nodes."""
    where, path = wide_origin(node)
    if where.target is not aten.where.self:
        return None
    condition, z, log = where.args
    greater = condition.target in (aten.gt.Scalar, aten.ge.Scalar)
    if not greater or condition.args[0] is not z or condition.args[1] != THRESHOLD:
        return None
    inner = [condition, log, where, *path]
    if log.target is aten.log1p.default:
        exp = log.args[0]
    elif log.target is aten.log.default and log.args[0].target is aten.add.Tensor:
        exp, one = log.args[0].args
        if one != 1:
            return None
        inner.append(log.args[0])
    else:
        return None
    if exp.target is not aten.exp.default or exp.args[0] is not z:
        return None
    return z, [exp, *inner]


def guard(found: Found) -> str | None:
    g, x, A, rate, bound = (found.values[name] for name in ("g", "x", "A", "rate", "bound"))
    if rate != 1:
        return f"the rate has a factor {rate}"
    if bound is not None and not -5 <= bound < 0:
        return f"the bound is {bound}, not in [-5, 0)"
    if value(g).dtype != accumulation_dtype(value(x)):
        return f"the gate of {value(x).dtype} is in {value(g).dtype}"
    shape = value(g).shape
    if not same_shape([value(x).numel()], [value(g).numel()]):
        return f"{x.name} has not an element for each of the gate"
    if len(shape) < 2 or (A is not None and not same_shape(shape[-2:-1], [value(A).numel()])):
        return "there is not one rate per head"
    return None


def replacement(graph: fx.Graph, found: Found) -> dict[fx.Node, fx.Node]:
    g, x, A, bias = (found.values[name] for name in ("g", "x", "A", "bias"))
    shape = value(g).shape
    x = reshape(graph, x, shape)
    A = None if A is None else reshape(graph, logarithm(graph, A), shape[-2:-1])
    bias = None if bias is None else reshape(graph, bias, shape[-2:])
    return {g: compute(graph, gate_op, x, A, bias, found.values["bound"])}


register("plain_gate", (chunk_cumsum_op, recurrent_kda_op), pattern, guard, replacement)
