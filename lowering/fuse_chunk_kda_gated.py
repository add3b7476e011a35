"""The chunked recurrence takes the raw gate and the raw beta: no cumulative gate in memory.

    chunk_kda(l2norm(q), l2norm(k), v, gate_cumsum(x, ...), beta_scale * sigmoid(beta))
    chunk_kda_gated(q, k, v, x, beta, ..., beta_scale, eps)

The norms are taken too where both are there and nothing else uses them. Where they were written by
`short_conv_qkv`, q and k are normalised already.
"""

from typing import Any

from kda_ops.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from torch import fx

from kda_ops.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.l2norm.op import l2norm_op
from lowering.parts import beta_under, cumulative_gate_under
from lowering.rewrite import Call, Found, emit, escapes, origin, register, reshape, value

FUSED = {chunk_kda_op: chunk_kda_gated_op, chunk_kda_state_op: chunk_kda_gated_state_op}


def pattern(node: fx.Node) -> Found | None:
    call: Any = Call.of(node)
    gate = cumulative_gate_under(call.args["G"], call.args["cu_seqlens"], call.args["chunks"])
    if gate is None:
        return None
    beta = beta_under(call.args["beta"])
    outputs = [n for n in call.nodes() if n is not node]
    inner = [*gate.inner, *([] if beta is None else beta[2]), *call.nodes()]
    norms = norms_of(call)
    for norm, path in norms:
        inner += [norm.node, *path]
    inputs = [n for n in call.inputs() if n not in inner]
    inputs += [n for n in gate.args.values() if isinstance(n, fx.Node)]
    inputs += [norm.args["x"] for norm, _ in norms] + ([] if beta is None else [beta[0]])
    found = {"call": call, "gate": gate, "beta": beta, "norms": norms}
    return Found(inner, outputs, inputs, found)


def norms_of(call: Call) -> list[tuple[Call, list[fx.Node]]]:
    """The norms of q and k and what leads from them to the call; empty if they are to stay."""
    found = []
    for name in ("q", "k"):
        node, path = origin(call.args[name])
        norm = Call.of(node)
        if norm is None or norm.op is not l2norm_op:
            return []
        inner = [node, *path]
        if escapes(Found([*inner, call.node], [call.node], [])):
            return []
        if value(node).shape[-1] != value(call.args[name]).shape[-1]:
            return []
        found.append((norm, path))
    (q, _), (k, _) = found
    return found if q.args["eps"] == k.args["eps"] else []


def guard(found: Found) -> str | None:
    if found.values["beta"] is None:
        return "beta is not a sigmoid, or twice one"
    return found.values["gate"].reason


def replacement(graph: fx.Graph, found: Found) -> dict[fx.Node, fx.Node]:
    call, gate = found.values["call"], found.values["gate"]
    beta, factor, _ = found.values["beta"]
    args = {
        **call.args,
        **gate.args,
        "beta": reshape(graph, beta, value(call.args["beta"]).shape),
        "beta_scale": factor,
        "qk_norm_eps": None,
    }
    for name, (norm, _) in zip(("q", "k"), found.values["norms"], strict=False):
        args[name] = reshape(graph, norm.args["x"], value(call.args[name]).shape)
        args["qk_norm_eps"] = norm.args["eps"]
    news, states = emit(graph, FUSED[call.op], args, call)
    olds = [call.result(i) for i in range(call.results)]
    return {old: new for old, new in zip(olds, news, strict=True) if old is not None} | states


register("chunk_kda_gated", tuple(FUSED), pattern, guard, replacement)
