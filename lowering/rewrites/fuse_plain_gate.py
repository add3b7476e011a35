"""The gate in plain PyTorch is the operator, where a recurrence or a cumsum takes it.

    -exp(A_log) * softplus(x + dt_bias)
    lower_bound * sigmoid(exp(A_log) * (x + dt_bias))
    gate(x, A_log, dt_bias, lower_bound)

A softplus is also `where(z > 20, z, log(1 + exp(z)))`, `log(1 + exp(z))` or `-logsigmoid(-z)`. The
operator computes it without the cancellation below z = -17 and the overflow of the second. With
frozen weights the rate `exp(A_log)`, or its negative, is a constant of the graph, and the operator
gets its logarithm.
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

from kda_ops._numerics import accumulation_dtype
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.gating.gate.op import gate_op
from kda_ops.lowering.graph.emitting import compute, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    same,
    same_shape,
    strip_views_and_casts,
    times_one,
    value,
)
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, POST_GRAD, Match, register
from kda_ops.lowering.rewrites.patterns.gates import one_more, sigmoid_of

aten = torch.ops.aten
THRESHOLD = 20  # of softplus: above it, it is the identity to fp32


@dataclass
class Product:
    """A product by its factors: a number, and the tensors with what leads from them to the product.

    A factor is a tensor and the node that has the shape in which it is multiplied.
    """

    number: float = 1.0
    factors: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    inner: list[fx.Node] = field(default_factory=list)


def product(node: fx.Node) -> Product:
    found = Product()
    pending = [(node, node)]
    while pending:
        node, shown = pending.pop()
        source, path = strip_views_and_casts(node)
        if source.target is aten.neg.default:
            found.number = -found.number
            pending.append((source.args[0], shown))
        elif source.target is aten.mul.Tensor:
            tensors = [x for x in source.args if isinstance(x, fx.Node)]
            pending += [(x, shown if len(tensors) == 1 else x) for x in tensors]
            found.number *= prod(x for x in source.args if not isinstance(x, fx.Node))
        else:
            found.factors.append((node, shown))
            continue
        found.inner += [source, *path]
    return found


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    g = call.args["g"]
    whole = product(g)
    found = softplus_gate(whole) if len(whole.factors) == 2 else bounded_gate(whole)
    if found is None or g not in whole.inner:
        return None
    z, found.values["g"] = found.values["z"], g
    add, path = strip_views_and_casts(z)
    x, bias = z, None
    if add.target is aten.add.Tensor and not add.kwargs:
        for first, second in (add.args, add.args[::-1]):
            if isinstance(second, fx.Node) and fits(second, add, value(g).shape[-2:]):
                x, bias = first, strip_views_and_casts(second)[0]
                found.inner += [add, *path]
                break
    x, _ = strip_views_and_casts(x)
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


def softplus_gate(whole: Product) -> Match | None:
    for (rate, shown), (rest, _) in (whole.factors, whole.factors[::-1]):
        A, softplus = rate_of(rate, shown), softplus_of(rest)
        if A is not None and softplus is not None:
            z, inner, sign = softplus
            number = -sign * whole.number * sign_of(A)
            times = [node for node in whole.inner if node.target is aten.mul.Tensor]
            values = {"z": z, "A": A, "rate": number, "bound": None, "times": times}
            return Match(inner, [], [], values)
    return None


def bounded_gate(whole: Product) -> Match | None:
    factor, path = strip_views_and_casts(whole.factors[0][0])
    sigmoid = sigmoid_of(factor) if len(whole.factors) == 1 else None
    if sigmoid is None:
        return None
    z, inner = sigmoid[0], [*sigmoid[1], *path]
    values: dict[str, Any] = {"A": None, "rate": 1, "bound": whole.number, "times": []}
    times, path = strip_views_and_casts(z)
    if times.target is aten.mul.Tensor and all(isinstance(x, fx.Node) for x in times.args):
        for rate, rest in (times.args, times.args[::-1]):
            if (A := rate_of(rate, rate)) is not None:
                z, inner = rest, [*inner, times, *path]
                values |= {"A": A, "rate": sign_of(A), "times": [times]}
                break
    return Match(inner, [], [], values | {"z": z})


def rate_of(node: fx.Node, shown: fx.Node) -> fx.Node | None:
    """`A_log` of `exp(A_log)`, one per head in the shape of `shown`, or the rate itself where it is
    a frozen constant. (The rate is small and may have other uses.)
    """
    exp, _ = strip_views_and_casts(node)
    if value(shown).shape[-1:] != (1,):
        return None
    if exp.target is aten.exp.default:
        A, _ = strip_views_and_casts(exp.args[0])
    elif exp.op == "get_attr" and sign_of(exp):
        A = exp
    else:
        return None
    return A if same_shape(value(shown).shape[-2:-1], [value(A).numel()]) else None


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


def softplus_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node], int] | None:
    """The input of a softplus, or of its negative, the nodes, and the sign."""
    whole, path = strip_views_and_casts(node)
    if whole.target is aten.sub.Tensor and not whole.kwargs:
        return negative_softplus(whole, path)
    if whole.target is not aten.where.self:
        found = log_of_exp(whole)
        return None if found is None else (found[0], [*found[1], *path], 1)
    condition, z, log = whole.args
    greater = condition.target in (aten.gt.Scalar, aten.ge.Scalar)
    found = log_of_exp(log) if greater and condition.args[1] == THRESHOLD else None
    if found is None:
        return None
    sources = [strip_views_and_casts(x) for x in (z, condition.args[0], found[0])]
    if not all(same(source, sources[0][0]) for source, _ in sources):
        return None
    ones = [node for _, path in sources for node in path if times_one(node)]
    return z, [*ones, condition, *found[1], whole, *path], 1


def log_of_exp(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The `z` of `log(1 + exp(z))`, and the nodes."""
    log, path = strip_views_and_casts(node)
    if not isinstance(log, fx.Node):
        return None
    more: Any = one_more(log.args[0]) if log.target is aten.log.default else None
    exp = log.args[0] if log.target is aten.log1p.default else more
    if exp is None or exp.target is not aten.exp.default:
        return None
    return exp.args[0], [exp, *([] if more is None else [log.args[0]]), log, *path]


def negative_softplus(
    difference: fx.Node, path: list[fx.Node]
) -> tuple[fx.Node, list[fx.Node], int] | None:
    """What `logsigmoid(y)` is, `min(0, y) - log(1 + exp(-|y|))`: the negative softplus of `-y`."""
    least, log = difference.args
    found = log_of_exp(log)
    if found is None or not isinstance(least, fx.Node) or least.target is not aten.minimum.default:
        return None
    (zero, y), (negative, inner) = least.args, found
    if zero.target is not aten.full.default or zero.args[1] != 0:
        return None
    absolute: Any = negative.args[0]
    if negative.target is not aten.neg.default or absolute.target is not aten.abs.default:
        return None
    if absolute.args[0] is not y or y.target is not aten.neg.default:
        return None
    return y.args[0], [y, absolute, negative, *inner, least, difference, *path], -1


def guard(match: Match) -> Refusal | None:
    g, x, A, rate, bound = (match.values[name] for name in ("g", "x", "A", "rate", "bound"))
    if rate != 1:
        return Refusal(f"the rate has a factor {rate}")
    if bound is not None and not -5 <= bound < 0:
        return Refusal(f"the bound is {bound}, not in [-5, 0)")
    if value(g).dtype != accumulation_dtype(value(x)):
        return Refusal(f"the gate of {value(x).dtype} is in {value(g).dtype}")
    shape = value(g).shape
    for times in match.values["times"]:
        # but for what is done to the rates alone
        of_rates = A is not None and statically_known_true(value(times).numel() == value(A).numel())
        if not of_rates and not same_shape(value(times).shape[-2:], shape[-2:]):
            return Refusal(f"{times.name} has other heads", times)
    if not same_shape([value(x).numel()], [value(g).numel()]):
        return Refusal(f"{x.name} has not an element for each of the gate", x)
    if len(shape) < 2 or (A is not None and not same_shape(shape[-2:-1], [value(A).numel()])):
        return Refusal("there is not one rate per head")
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    g, x, A, bias = (match.values[name] for name in ("g", "x", "A", "bias"))
    shape = value(g).shape
    x = reshape(graph, x, shape)
    A = None if A is None else reshape(graph, logarithm(graph, A), shape[-2:-1])
    bias = None if bias is None else reshape(graph, bias, shape[-2:])
    return {g: compute(graph, gate_op, x, A, bias, match.values["bound"])}


register(
    "plain_gate",
    (chunk_cumsum_op, recurrent_kda_op),
    pattern,
    guard,
    replacement,
    stages=(BEFORE_AUTOGRAD, POST_GRAD),
)
