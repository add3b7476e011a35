"""The chunked recurrence takes the raw gate and the raw beta: no cumulative gate in memory.

    chunk_kda(q, k, v, gate_cumsum(x, ...), beta_scale * sigmoid(beta))
    chunk_kda_gated(q, k, v, x, beta, ..., beta_scale)

Norms of q and k stay in front. The operator could take them, but its prepare kernel is short of
registers: on an H200 at T = 8192, H = 32 the norms add 112 us inside it and 67 us in kernels of
their own, and behind a convolution `short_conv_qkv` has them for less.
"""

from typing import Any

from torch import fx

from kda_ops.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from lowering.parts import beta_under, cumulative_gate_under
from lowering.rewrite import Call, Found, emit, register, reshape, value

FUSED = {chunk_kda_op: chunk_kda_gated_op, chunk_kda_state_op: chunk_kda_gated_state_op}


def pattern(node: fx.Node) -> Found | None:
    call: Any = Call.of(node)
    gate = cumulative_gate_under(call.args["G"], call.args["cu_seqlens"], call.args["chunks"])
    if gate is None:
        return None
    beta = beta_under(call.args["beta"])
    outputs = [n for n in call.nodes() if n is not node]
    inner = [*gate.inner, *([] if beta is None else beta[2]), *call.nodes()]
    inputs = [n for n in call.inputs() if n not in inner]
    inputs += [n for n in gate.args.values() if isinstance(n, fx.Node)]
    inputs += [] if beta is None else [beta[0]]
    found = {"call": call, "gate": gate, "beta": beta}
    return Found(inner, outputs, inputs, found)


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
    news, states = emit(graph, FUSED[call.op], args, call)
    olds = [call.result(i) for i in range(call.results)]
    return {old: new for old, new in zip(olds, news, strict=True) if old is not None} | states


register("chunk_kda_gated", tuple(FUSED), pattern, guard, replacement)
