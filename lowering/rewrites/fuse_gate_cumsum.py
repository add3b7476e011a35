"""The gate and its cumsum in log2 are the cumulative gate, which has a hand-written kernel.

    gate(x, A_log, dt_bias, lower_bound) -> views -> chunk_cumsum(_, C, 1 / ln 2, ...)
    gate_cumsum(x, A_log, dt_bias, lower_bound, C, ...) -> views

As a scan in generated code the pair is one kernel too, but one that exchanges sums between threads
and calls library logarithms. That form stays where the producer of x can only fuse with it.
"""

from typing import Any

import torch
from torch import fx

from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.gating.gate.op import gate_op
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.graph.emitting import compute, replay
from kda_ops.lowering.graph.matching import Call, Refusal, same_shape, strip_views, value
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.gates import gate_args, other_scale


def pattern(node: fx.Node) -> Match | None:
    cumsum: Any = Call.of(node)
    source, path = strip_views(cumsum.args["g"])
    gate = Call.of(source)
    if gate is None or gate.op is not gate_op or value(node).device.type != "cuda":
        return None
    inner = [source, *path, node]
    inputs = [*gate.inputs(), *cumsum.inputs("g")]
    return Match(inner, [node], inputs, {"gate": gate, "path": path, "cumsum": cumsum})


def guard(match: Match) -> Refusal | None:
    gate, cumsum = match.values["gate"], match.values["cumsum"]
    refusal = other_scale(cumsum)
    if refusal is not None:
        return refusal
    shape, other = value(gate.node).shape, value(cumsum.node).shape
    if len(shape) != 4 or not same_shape(shape[:2], other[:2]):
        return Refusal(f"{cumsum.node.name} has another batch or length", cumsum.node)
    raw_gate = gate.args["raw_gate"]
    if fuses_forward(raw_gate):
        return Refusal(f"what makes {raw_gate.name} fuses with the scan", raw_gate)
    return None


def fuses_forward(x: fx.Node) -> bool:
    """Whether Inductor would compute `x` inside the kernel of its only user."""
    x, path = strip_views(x)
    alone = all(len(node.users) == 1 for node in (x, *path))
    return alone and torch.Tag.pointwise in getattr(x.target, "tags", ())


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    gate, cumsum = match.values["gate"], match.values["cumsum"]
    args = {**gate_args(gate), **cumsum.args}
    names = [argument.name for argument in gate_cumsum_op._schema.arguments]
    fused = compute(graph, gate_cumsum_op, *[args[name] for name in names])
    return {cumsum.node: replay(graph, match.values["path"], gate.node, fused)}


register("gate_cumsum", (chunk_cumsum_op,), pattern, guard, replacement)
