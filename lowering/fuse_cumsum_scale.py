"""A factor multiplied onto a chunk cumsum moves into it.

    chunk_cumsum(g, C, scale, ...) -> views, widening casts -> x * factor
    chunk_cumsum(g, C, scale * factor, ...) -> views, widening casts          factor a number
    chunk_cumsum(g * factor, C, scale, ...) -> views, widening casts          factor a scalar tensor

Without it the multiplication is a kernel of its own, which reads and writes the whole result again:
a scan is written to memory in the order of its chunks, and after a view Inductor does not find that
order in the loop of the multiplication. (Under `dynamic=True` a global Python float is a tensor.)
"""

from typing import Any

import torch
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    register_graph_pattern,
)

from kda_ops.chunk_cumsum.op import chunk_cumsum_op
from lowering.rewrite import pattern_pass

aten = torch.ops.aten
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
)


def cumsum_and_views(match: Match) -> list[torch.fx.Node]:
    """The cumsum under a match and what leads from it to the product; empty if it cannot fuse."""
    node, factor, product = match.kwargs["x"], match.kwargs["factor"], match.output_node()
    if node.meta["val"].dtype != product.meta["val"].dtype:
        return []
    path = [node]
    while path[0].target in VIEWS or widens(path[0]):
        path.insert(0, path[0].args[0])
    cumsum = path[0]
    if cumsum.target != chunk_cumsum_op or any(len(node.users) != 1 for node in path):
        return []
    if isinstance(factor, torch.fx.Node):
        g = cumsum.args[0].meta["val"]
        scalar = isinstance(factor.meta["val"], torch.Tensor) and factor.meta["val"].dim() == 0
        return path if scalar and g.dtype == cumsum.meta["val"].dtype else []
    return path if type(factor) in (int, float) else []


def widens(node: torch.fx.Node) -> bool:
    """Whether a node is a cast that loses nothing, so that it commutes with a multiplication."""
    if node.target != torch.ops.prims.convert_element_type.default:
        return False
    source, dtype = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return dtype.is_floating_point and torch.promote_types(source, dtype) == dtype


@register_graph_pattern(
    CallFunction(aten.mul.Tensor, KeywordArg("x"), KeywordArg("factor")),
    pass_dict=pattern_pass(),
    extra_check=lambda match: bool(cumsum_and_views(match)),
)
def fuse_cumsum_scale(match: Match, *, x: Any, factor: Any) -> None:
    graph, product = match.graph, match.output_node()
    path = cumsum_and_views(match)
    g, chunk_size, scale, *rest = path[0].args
    with graph.inserting_before(product):  # where the factor exists
        if isinstance(factor, torch.fx.Node):
            scaled = graph.call_function(aten.mul.Tensor, (g, factor))
            scaled.meta["val"] = g.meta["val"] * factor.meta["val"]
            g = scaled
        else:
            scale = scale * factor
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in path:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[path[0]].args = (g, chunk_size, scale, *rest)
    product.replace_all_uses_with(copies[path[-1]])
    for node in (product, *reversed(path)):
        graph.erase_node(node)
