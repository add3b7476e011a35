"""A factor multiplied onto a chunk cumsum moves into it.

    chunk_cumsum(g, C, scale, ...) -> views, widening casts -> x * factor     or x / number
    chunk_cumsum(g, C, scale * factor, ...) -> views, widening casts          factor a number
    chunk_cumsum(g * factor, C, scale, ...) -> views, widening casts          factor a scalar tensor

Without it the multiplication is a kernel of its own, which reads and writes the whole result again:
a scan is written to memory in the order of its chunks, and after a view Inductor does not find that
order in the loop of the multiplication. (Under `dynamic=True` a global Python float is a tensor.)
"""

from typing import Any

import torch
from torch import fx

from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.lowering.graph.emitting import compute, replay
from kda_ops.lowering.graph.matching import VIEWS, Call, Refusal, is_lossless_cast, only_user, value
from kda_ops.lowering.rewrites.framework import Match, register

aten, prims = torch.ops.aten, torch.ops.prims
PASSES = (*VIEWS, aten.permute.default, prims.convert_element_type.default)


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    path = [node]
    while (found := product_of(path[-1])) is None:
        user = only_user(path[-1])
        if user is None or user.target not in PASSES:
            return None
        path.append(user)
    product, factor = found
    inputs = [x for x in (*call.inputs(), factor) if isinstance(x, fx.Node)]
    values = {"call": call, "path": path, "product": product, "factor": factor}
    return Match([*path, product], [product], inputs, values)


def product_of(x: fx.Node) -> tuple[fx.Node, Any] | None:
    """The product that a number or a scalar tensor makes of `x`, and that factor."""
    for user in x.users:
        if user.target is aten.div.Tensor and type(user.args[1]) in (int, float) and user.args[1]:
            return user, 1 / user.args[1]
        if user.target is not aten.mul.Tensor:
            continue
        factor = user.args[1] if user.args[0] is x else user.args[0]
        scalar = value(factor)
        if type(scalar) in (int, float) or (isinstance(scalar, torch.Tensor) and not scalar.dim()):
            return user, factor
    return None


def guard(match: Match) -> Refusal | None:
    call, path, product = (match.values[name] for name in ("call", "path", "product"))
    for node in path:
        if node.target is prims.convert_element_type.default and not is_lossless_cast(node):
            return Refusal(f"{node.name} rounds before the product", node)
    if value(product).dtype != value(path[-1]).dtype:
        return Refusal(f"the product is in {value(product).dtype}", product)
    g = call.args["g"]
    if isinstance(match.values["factor"], fx.Node) and value(g).dtype != value(path[0]).dtype:
        return Refusal(f"{g.name} times a tensor would be rounded to {value(g).dtype}", g)
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    call, path, factor = (match.values[name] for name in ("call", "path", "factor"))
    args = dict(call.args)
    if isinstance(factor, fx.Node):
        args["g"] = compute(graph, aten.mul.Tensor, args["g"], factor)
    else:
        args["scale"] *= factor
    scaled = compute(graph, chunk_cumsum_op, *args.values())
    return {match.values["product"]: replay(graph, path[1:], path[0], scaled)}


register("cumsum_scale", (chunk_cumsum_op,), pattern, guard, replacement)
