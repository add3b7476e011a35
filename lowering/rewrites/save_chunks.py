"""In training graphs on a GPU the chunked recurrence saves what its gradient would compute again.

    chunk_kda_gated(q, ...);         chunk_kda_gated_backward(q, ..., do, ...)

    chunk_kda_gated_saving(q, ...);  chunk_kda_gated_saved_backward(q, ..., o, tiles, ..., do)

It looks at the joint graph after all other rewrites, since they know the plain operators. Where the
forward is recomputed for the gradient anyway, nothing is saved.
"""

from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from kda_ops._registry import OPERATORS, backward_of
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.lowering.graph.emitting import emit
from kda_ops.lowering.graph.matching import Call, Refusal, forward_of, value, values
from kda_ops.lowering.rewrites.framework import JOINT, Match, describe, place, register, runs_on_gpu

NAME = "save_chunks"
FORWARDS = {backward_of(op): op for op in (chunk_kda_op, chunk_kda_gated_op)}
RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def pattern(node: fx.Node) -> Match | None:
    backward: Any = Call.of(node)
    if not runs_on_gpu(value(backward.args["q"])):
        return None
    forward = forward_of(backward, FORWARDS[backward.op])
    if forward is None:
        return None
    outputs = [[x for x in call.nodes() if x is not call.node] for call in (forward, backward)]
    given = [call.node.all_input_nodes for call in (forward, backward)]
    parts = tuple(
        Match(call.nodes(), outs, ins)
        for call, outs, ins in zip((forward, backward), outputs, given, strict=True)
    )
    return Match(
        [*forward.nodes(), *backward.nodes()],
        [*outputs[0], *outputs[1]],
        [*given[0], *given[1]],
        {"forward": forward, "backward": backward},
        parts,
        forward.node,
    )


def guard(match: Match) -> Refusal | None:
    forward: Call = match.values["forward"]
    saving = OPERATORS[forward.op].saving
    if forward.node.meta.get("recompute") in RECOMPUTED:
        return Refusal("the forward is recomputed for its gradient", forward.node)
    given = values(list(forward.args.values()))
    if saving is None or not saving.applies(given):
        return Refusal("saving takes more than kda_ops.config.saved_bytes, or other kernels")
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    forward: Call = match.values["forward"]
    backward: Call = match.values["backward"]
    saving: Any = OPERATORS[forward.op].saving
    with graph.inserting_before(forward.node):
        before = forward.node.prev
        found, _ = emit(graph, saving.forward.op, forward.args)
        made = forward.node.prev
        while made is not before:
            describe(made, forward.node)
            made.meta["rewrite"] = NAME
            place(made, forward.node)
            made = made.prev
    outputs, kept = saving.split_results(found)
    gradients, _ = emit(graph, saving.backward.op, {**backward.args, **kept})
    place(gradients[0].args[0] if len(gradients) > 1 else gradients[0], backward.node)
    news = {}
    for call, results in ((forward, outputs), (backward, gradients)):
        for i, new in enumerate(results):
            old = call.result(i)
            if old is not None:
                news[old] = new
            elif not new.users:
                graph.erase_node(new)
    return news


register(NAME, tuple(FORWARDS), pattern, guard, replacement, stages=(JOINT,))
