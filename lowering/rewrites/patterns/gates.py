"""What several rewrites recognise: the raw beta under a sigmoid, the raw input under a gate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kda_ops._numerics import CHUNK, RCP_LN2
from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.gating.gate.op import gate_op
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    same,
    same_shape,
    strip_casts,
    strip_views,
    strip_views_and_casts,
    value,
)

aten = torch.ops.aten
SAME_NUMBER = 1e-12


@dataclass(frozen=True)
class Gate:
    """A gate under an operator's argument.

    Attributes:
        inner: Its nodes, from the operator that takes the raw input on.
        args: `raw_gate`, `A_log`, `dt_bias` and `lower_bound`.
        refusal: Why it is not the gate that was looked for, or None.
    """

    inner: list[fx.Node]
    args: dict[str, Any]
    refusal: Refusal | None = None


def gate_under(g: fx.Node) -> Gate | None:
    """The gate in nats that an argument is."""
    node, path = strip_views_and_casts(g)
    call = Call.of(node)
    if call is None or call.op is not gate_op:
        return None
    refusal = None
    if not same_shape(value(node).shape[-2:], value(g).shape[-2:]):
        refusal = Refusal(f"{node.name} has other heads", node)
    return Gate([node, *path], gate_args(call), refusal)


def cumulative_gate_under(G: fx.Node, cu_seqlens: Any, chunk_indices: Any) -> Gate | None:
    """The cumulative gate in log2 that an argument is, as one operator or as two."""
    node, path = strip_views(G)
    call = Call.of(node)
    if call is None or call.op not in (gate_cumsum_op, chunk_cumsum_op):
        return None
    inner = [node, *path]
    refusal = None
    if call.op is gate_cumsum_op:
        args = gate_args(call)
    else:
        gate = gate_under(call.args["g"])
        if gate is None:
            return None
        inner, args = [*gate.inner, *inner], gate.args
        refusal = gate.refusal or other_scale(call)
    if call.args["chunk_size"] != CHUNK:
        refusal = Refusal(
            f"the chunk size of {node.name} is {call.args['chunk_size']}, not {CHUNK}", node
        )
    for name, expected in (("cu_seqlens", cu_seqlens), ("chunk_indices", chunk_indices)):
        if not same(call.args[name], expected):
            refusal = Refusal(f"{node.name} has other {name}", node)
    if not same_shape(value(node).shape, value(G).shape):
        refusal = Refusal(f"{node.name} is used in another shape", node)
    return Gate(inner, args, refusal)


def other_scale(cumsum: Call) -> Refusal | None:
    """Why a chunk cumsum of nats is not in log2, or None."""
    scale = cumsum.args["scale"]
    if abs(scale / RCP_LN2 - 1) > SAME_NUMBER:
        return Refusal(f"the scale of {cumsum.node.name} is {scale}, not 1 / ln 2", cumsum.node)
    return None


def gate_args(call: Call) -> dict[str, Any]:
    return {name: call.args[name] for name in ("raw_gate", "A_log", "dt_bias", "lower_bound")}


def beta_under(beta: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """`(raw beta, factor, nodes)` of `factor * sigmoid(raw beta)`, the factor 1 or 2."""
    node, inner = strip_views_and_casts(beta)
    factor = 1.0
    if node.target is aten.mul.Tensor and node.args[1] in (1, 2):
        factor = float(node.args[1])
        inside, path = strip_views_and_casts(node.args[0])
        inner = [*path, node, *inner]
        node = inside
    found = sigmoid_of(node)
    return None if found is None else (strip_casts(found[0]), factor, [*found[1], *inner])


def sigmoid_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The input of a sigmoid, also written `1 / (1 + exp(-x))`, and its nodes."""
    if node.target is aten.sigmoid.default:
        return node.args[0], [node]
    exp = one_more(node.args[0]) if node.target is aten.reciprocal.default else None
    if exp is None or exp.target is not aten.exp.default:
        return None
    negative: Any = exp.args[0]
    if negative.target is not aten.neg.default:
        return None
    return negative.args[0], [negative, exp, node.args[0], node]


def one_more(node: Any) -> Any:
    """The `x` of `x + 1`."""
    plain = node.target in (aten.add.Tensor, aten.add.Scalar) and not node.kwargs
    return node.args[0] if plain and node.args[1] == 1 else None
