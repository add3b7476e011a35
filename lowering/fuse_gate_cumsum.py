"""The gate and its cumsum in log2 are the cumulative gate, which has a hand-written kernel.

    gate(x, A_log, dt_bias, lower_bound) -> views -> chunk_cumsum(_, C, 1 / ln 2, ...)
    gate_cumsum(x, A_log, dt_bias, lower_bound, C, ...) -> view

As a scan in generated code the pair is one kernel too, but one that exchanges sums between threads
and calls library logarithms. That form stays where the producer of x can only fuse with it.
"""

from typing import Any

import torch
from torch._inductor.pattern_matcher import Arg, CallFunction, Match, register_graph_pattern

from kda_ops.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.formulas import RCP_LN2
from kda_ops.gate.op import gate_op
from kda_ops.gate_cumsum.op import gate_cumsum_op
from lowering.rewrite import pattern_pass

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
SAME_NUMBER = 1e-12


def gate_and_views(match: Match) -> list[torch.fx.Node]:
    """The gate under a match and what leads from it to the cumsum; empty if it cannot fuse."""
    cumsum = match.output_node()
    g, scale = cumsum.args[0], cumsum.args[2]
    value = cumsum.meta["val"]
    if value.device.type != "cuda" or value.dtype != torch.float32:
        return []
    if abs(scale / RCP_LN2 - 1) > SAME_NUMBER:
        return []
    path = [g]
    while path[0].target in RESHAPES:
        path.insert(0, path[0].args[0])
    gate = path[0]
    if gate.target != gate_op or any(len(node.users) != 1 for node in path):
        return []
    shape = gate.meta["val"].shape
    if len(shape) != 4 or shape[:2] != value.shape[:2] or fuses_forward(gate.args[0]):
        return []
    return path


def fuses_forward(x: torch.fx.Node) -> bool:
    """Whether Inductor would compute `x` inside the kernel of its only user."""
    while x.target in RESHAPES and len(x.users) == 1:
        x = x.args[0]
    return len(x.users) == 1 and torch.Tag.pointwise in getattr(x.target, "tags", ())


@register_graph_pattern(
    CallFunction(chunk_cumsum_op, Arg(), Arg(), Arg(), Arg(), Arg()),
    pass_dict=pattern_pass(),
    extra_check=lambda match: bool(gate_and_views(match)),
)
def fuse_gate_cumsum(match: Match, g: Any, chunk_size: int, _: float, *table: Any) -> None:
    graph, cumsum = match.graph, match.output_node()
    path = gate_and_views(match)
    with graph.inserting_before(cumsum):
        fused = graph.call_function(gate_cumsum_op, (*path[0].args, chunk_size, *table))
        fused.meta["val"] = torch.empty_like(path[0].meta["val"])
        copies = {path[0]: fused}
        for node in path[1:]:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    cumsum.replace_all_uses_with(copies[path[-1]])
    for node in (cumsum, *reversed(path)):
        graph.erase_node(node)
