"""A decode step of a layer, between its projections, is one kernel.

    q, k, v = split(short_conv_update(x));  q, k = l2norm(q), l2norm(k)
    o = recurrent_kda(q, k, v, gate(f), beta_scale * sigmoid(beta))
    rms_norm_gated(o, z)
    kda_decode(x, f, beta, z)

With a convolution each for q, k and v, each with a state of its own, the kernel takes those.

One token per sequence, or a slot for each of a sequence's speculative tokens.

Both states are written in place by the one kernel. A `where` that clears the padding rows after the
last sequence goes too: the kernel writes zeros there.
"""

from typing import Any

import torch
from torch import fx

from kda_ops.conv.short_conv_update.op import short_conv_update_op
from kda_ops.delta_rule.kda_decode.op import (
    MOST_TOKENS,
    conv_tokens,
    kda_decode_op,
    kda_decode_unpacked_op,
)
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.lowering.graph.emitting import emit, reshape
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    follow_views,
    only_user,
    same,
    same_shape,
    strip_views,
    value,
)
from kda_ops.lowering.rewrites.framework import Match, register
from kda_ops.lowering.rewrites.patterns.gates import beta_under, gate_under
from kda_ops.lowering.rewrites.patterns.heads import (
    convolutions_under,
    heads_of,
    renamed,
    separate_heads,
    unlike,
    unpacked_args,
)
from kda_ops.norm.rms_norm_gated.op import rms_norm_gated_op

aten, prims = torch.ops.aten, torch.ops.prims


def pattern(node: fx.Node) -> Match | None:
    step: Any = Call.of(node)
    convs = convolutions_under(step, (short_conv_update_op,))
    o = step.result()
    if not convs or o is None:
        return None
    packed = convs[0].result()
    if packed is None:
        return None
    heads = heads_of(packed) if len(convs) == 1 else separate_heads(convs)
    if heads is None:
        return None
    inner = [*[n for conv in convs for n in conv.nodes()], *heads.inner, *step.nodes()]
    for name in ("q", "k", "v"):
        source, path = strip_views(step.args[name])
        inner += [source, *path]
    gate, beta = gate_under(step.args["g"]), beta_under(step.args["beta"])
    inner += ([] if gate is None else gate.inner) + ([] if beta is None else beta[2])
    path = follow_views(o)
    norm = Call.of(only_user(path[-1]))
    if norm is None or norm.op is not rms_norm_gated_op or norm.args["o"] is not path[-1]:
        norm = None
    y = o
    if norm is not None:
        y = norm.node
        inner += [*path, y]
        cleared = clearing(y, step.args["cu_seqlens"])
        if cleared is not None:
            y = cleared
            inner += [y]
    states = [new for call in (*convs, step) for _, new in call.new_bases()]
    read = [n for conv in convs for n in conv.inputs()]
    read += step.inputs("q", "k", "v", "g", "beta")
    read += [] if gate is None else gate.args.values()
    read += [] if beta is None else [beta[0]]
    read += [] if norm is None else norm.inputs("o")
    # one write may follow another in the same tensor
    inputs = [n for n in read if isinstance(n, fx.Node) and n not in states]
    found = {"convs": convs, "step": step, "heads": heads, "gate": gate, "beta": beta}
    found |= {"norm": norm, "y": y}
    return Match(inner, [y, *states], inputs, found)


def clearing(y: fx.Node, cu_seqlens: Any) -> fx.Node | None:
    """The `where` that keeps the rows of `y [1, T, HV, V]` before `cu_seqlens[-1]` alone."""
    where = only_user(y)
    if where is None or where.target is not aten.where.self or where.args[1] is not y:
        return None
    zero = where.args[2]
    if isinstance(zero, fx.Node):
        if zero.target is not aten.full.default or value(zero).dim():
            return None
        zero = zero.args[1]
    less, _ = strip_views(where.args[0])
    T = value(y).shape[-3]
    shape = value(where.args[0]).shape
    if zero != 0 or less.target is not aten.lt.Tensor or not same_shape(shape[-3:], (T, 1, 1)):
        return None
    row, end = less.args
    end, _ = strip_views(end)
    if row.target is not prims.iota.default or end.target is not aten.select.int:
        return None
    counts = not row.kwargs.get("start") and row.kwargs.get("step") == 1
    last = len(value(end.args[0]).shape) == 1 and same(end.args[0], cu_seqlens)
    return where if counts and last and end.args[1:] == (0, -1) else None


def guard(match: Match) -> Refusal | None:
    convs, step, norm = (match.values[name] for name in ("convs", "step", "norm"))
    conv = convs[0]
    refusal = match.values["heads"].guard() or (unlike(convs) if len(convs) == 3 else None)
    if refusal is not None:
        return refusal
    heads = match.values["heads"]
    for name, expected in zip("qkv", [*[n.node for n in heads.norms], heads.parts[2]], strict=True):
        if strip_views(step.args[name])[0] is not expected:
            return Refusal(f"{name} is not the {name} of {conv.node.name}", conv.node)
    H, K = value(step.args["q"]).shape[-2:]
    if not same_shape((heads.key_dim, heads.head_dim), (H * K, K)):
        made = f"{heads.key_dim // heads.head_dim} x {heads.head_dim}"
        return Refusal(
            f"{step.node.name} takes heads of {H} x {K}, not of {made} as they are normalised"
        )
    gate = match.values["gate"]
    if gate is None or gate.refusal is not None:
        return Refusal("g is not a gate") if gate is None else gate.refusal
    if match.values["beta"] is None:
        return Refusal("beta is not a sigmoid, or twice one")
    o = step.result()
    if norm is None:
        return Refusal(f"{o.name} does not go into rms_norm_gated alone", o)
    if not same_shape(value(norm.node).shape[-2:], value(o).shape[-2:]):
        return Refusal(f"{norm.node.name} does not normalise the value heads", norm.node)
    for ours, theirs in (
        ("state_indices", "state_indices"),
        ("num_accepted", "num_accepted"),
        ("cu_seqlens", "cu_seqlens"),
    ):
        if not same(step.args[ours], conv.args[theirs]):
            return Refusal(f"{conv.node.name} and {step.node.name} have other {ours}")
    if step.args["cu_seqlens"] is None:
        # [N, D] or [N, 1, D], and [N, 1, H, K]
        tokens = (*value(conv.args["x"]).shape[1:-1], value(step.args["q"]).shape[1])
        if not same_shape(tokens, (1,) * len(tokens)):
            return Refusal("several tokens per sequence without cu_seqlens")
    else:
        weight = value(conv.args["weight"])
        most = conv_tokens(conv.view("conv_state"), weight, conv.args["layout"])
        if most > MOST_TOKENS:
            return Refusal(f"a sequence may have {most} tokens, more than {MOST_TOKENS}")
    return state_used_between(convs, step)


def state_used_between(convs: list[Call], step: Call) -> Refusal | None:
    """Why the two writes of states are not one: others read or write a state in between."""
    news = [new for conv in convs for _, new in conv.new_bases()]
    writers = [step.node, *[conv.node for conv in convs]]
    for new in news:
        for user in new.users:
            if user not in writers and user < step.node:
                return Refusal(
                    f"{user.name} uses the convolution state before the recurrence", user
                )
    for base in step.bases():
        # another layer's step on the same cache may be anywhere before this one
        by_operator = base.op == "call_function" and Call.of(base.args[0]) is not None
        if base not in news and min(writers) < base and not by_operator:
            return Refusal(
                f"{base.name} is the recurrent state, written after the convolution", base
            )
        if base in news and len(base.users) > 1:
            return Refusal(f"{base.name} is used before the recurrence", base)
    return None


def replacement(graph: fx.Graph, match: Match) -> dict[fx.Node, fx.Node]:
    convs, step, norm = (match.values[name] for name in ("convs", "step", "norm"))
    beta, factor, _ = match.values["beta"]
    heads, gate, y = (match.values[name] for name in ("heads", "gate", "y"))
    z = norm.args["output_gate"]
    B, T, HV, V = value(step.result()).shape
    T = B * T
    inputs = {"x": convs[0].args["x"]} if len(convs) == 1 else unpacked_args(convs)
    xs = ("x",) if len(convs) == 1 else ("q", "k", "v")
    args = {
        **step.args,
        **convs[0].args,
        **gate.args,
        **inputs,
        **{name: reshape(graph, inputs[name], (T, value(inputs[name]).shape[-1])) for name in xs},
        "raw_gate": reshape(
            graph, gate.args["raw_gate"], (1, T, *value(step.args["g"]).shape[-2:])
        ),
        "raw_beta": reshape(graph, beta, (1, T, HV)),
        "output_gate": reshape(graph, z, (1, T, HV, V)),
        "beta_scale": factor,
        "norm_weight": norm.args["weight"],
        "norm_eps": norm.args["eps"],
        "qk_norm_eps": heads.norm_eps,
    }
    if len(convs) == 1:
        (new,), states = emit(graph, kda_decode_op, args, *convs, step)
    else:
        (new,), states = emit(graph, kda_decode_unpacked_op, args, *renamed(convs), step)
    return {y: reshape(graph, new, value(y).shape)} | states


register("kda_decode", (recurrent_kda_op,), pattern, guard, replacement)
