"""The chunked recurrence takes the raw gate and the raw beta: no cumulative gate in memory.

    chunk_kda(q, k, v, gate_cumsum(x, ...), beta_scale * sigmoid(beta))
    chunk_kda_gated(q, k, v, x, beta, ..., beta_scale)

Norms of q and k stay in front; `fuse_chunk_norms` goes on from there.

Whether the gate belongs inside is chosen by the table, or by timing both (`kda_ops.tuning`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kda_ops._numerics import CHUNK
from kda_ops._registry import OPERATORS
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import Call, Refusal, value
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.gates import beta_under, cumulative_gate_under
from kda_ops.tuning import choose
from kda_ops.tuning.example_inputs import examples

FUSED = {chunk_kda_op: chunk_kda_gated_op, chunk_kda_state_op: chunk_kda_gated_state_op}


def pattern(node: fx.Node) -> Match | None:
    call: Any = Call.of(node)
    gate = cumulative_gate_under(
        call.args["g_cumsum"], call.args["cu_seqlens"], call.args["chunk_indices"]
    )
    if gate is None:
        return None
    beta = beta_under(call.args["beta"])
    outputs = [n for n in call.nodes() if n is not node]
    inner = [*gate.inner, *([] if beta is None else beta[2]), *call.nodes()]
    inputs = call.inputs("g_cumsum", "beta")
    inputs += [n for n in gate.args.values() if isinstance(n, fx.Node)]
    inputs += [] if beta is None else [beta[0]]
    found = {"call": call, "gate": gate, "beta": beta}
    return Match(inner, outputs, inputs, found)


def guard(match: Match) -> Refusal | None:
    if match.values["beta"] is None:
        return Refusal("beta is not a sigmoid, or twice one")
    return match.values["gate"].refusal or gate_is_faster_alone(match)


def gate_is_faster_alone(match: Match) -> Refusal | None:
    """Why the gate stays outside: the table says so, or it was timed."""
    call: Call = match.values["call"]
    _, factor, _ = match.values["beta"]
    args = {name: value(x) for name, x in call.args.items()}
    args |= {name: value(x) for name, x in match.values["gate"].args.items()}
    args |= {"raw_beta": args["beta"], "beta_scale": factor, "qk_norm_eps": None}
    args["raw_gate"] = args["raw_gate"].reshape(args["g_cumsum"].shape)
    q, v = args["q"], args["v"]

    def bench(values: dict[str, Any]) -> Callable[[], Any]:
        names = OPERATORS[FUSED[call.op]].parameters
        inputs = examples(names, [args[name] for name in names], q.device)
        if values["form"] == "fused":
            return lambda: FUSED[call.op](*inputs)
        by_name = dict(zip(names, inputs, strict=True))

        def run() -> None:
            gate = [by_name[name] for name in ("raw_gate", "A_log", "dt_bias", "lower_bound")]
            tables = (by_name["cu_seqlens"], by_name["chunk_indices"])
            by_name["g_cumsum"] = gate_cumsum_op(*gate, CHUNK, *tables)
            beta = factor * torch.sigmoid(by_name["raw_beta"].float())
            values = {**by_name, "beta": beta}
            call.op(*[values[argument.name] for argument in call.op._schema.arguments])

        return run

    chosen = choose(
        "chunk_kda_gated.form",
        q.device,
        bench=bench,
        H=q.shape[2],
        HV=v.shape[2],
        K=q.shape[3],
        V=v.shape[3],
        dtype=q.dtype,
        bounded=args["lower_bound"] is not None,
        varlen=args["cu_seqlens"] is not None,
    )
    if chosen["form"] == "separate":
        return Refusal("the gate is faster in a kernel of its own here")
    return None


def fused_args(graph: fx.Graph, match: Match) -> dict[str, Any]:
    """The arguments of the fused operator by name, of norms those before it."""
    call, gate = match.values["call"], match.values["gate"]
    beta, factor, _ = match.values["beta"]
    return {
        **call.args,
        **gate.args,
        "raw_gate": reshape(graph, gate.args["raw_gate"], value(call.args["g_cumsum"]).shape),
        "raw_beta": reshape(graph, beta, value(call.args["beta"]).shape),
        "beta_scale": factor,
        "qk_norm_eps": None,
    }


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    call = match.values["call"]
    news, states = emit(graph, FUSED[call.op], fused_args(graph, match), call)
    olds = [call.result(i) for i in range(call.results)]
    return {old: new for old, new in zip(olds, news, strict=True) if old is not None} | states


register("chunk_kda_gated", tuple(FUSED), pattern, guard, replacement)
