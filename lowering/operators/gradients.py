"""Gradients as IR, which fuses with its neighbours: of pointwise work and of rows by their
formulas, of sums along a chunk as a scan from its end. Sums over tokens are reductions: no atomics.
On a GPU that of the gated norm is a kernel: Inductor reads its inputs once for the rows and again
for the weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V

from kda_ops._gradients import Signature
from kda_ops._numerics import RCP_LN2
from kda_ops._registry import OPERATORS, backward_of
from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.gating.formulas import gate_nats, gate_nats_gradients
from kda_ops.gating.gate.op import gate_op
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.inline import (
    call_operator,
    fake_arguments,
    inline,
    inline_launcher,
    lowers,
    on_gpu,
)
from kda_ops.lowering.operators.chunk_cumsum import Direction, has_chunks, sums_in_chunks
from kda_ops.norm.formulas import gated_rms_norm_gradients, l2_normalized_gradient
from kda_ops.norm.l2norm.op import l2norm_op
from kda_ops.norm.rms_norm_gated.op import rms_norm_gated_op
from kda_ops.varlen import real_rows

aten = torch.ops.aten


def as_operator(op: Any, formula: Callable[..., Any]) -> Callable[..., Any]:
    """The gradients that are needed, called like the backward of `op`.

    `formula` takes what the backward takes but `needs_gradient`; it returns a function that makes
    the gradient for each tensor argument.
    """
    signature = Signature(op)

    def gradients(*args: Any) -> Any:
        makers = dict(zip(signature.wanted, formula(*args[:-1]), strict=True))
        found = [
            makers[i]().reshape(args[i].shape).to(args[i].dtype).contiguous()
            for i in signature.wanted
            if args[-1][i]
        ]
        return signature.gradients(args, found)

    return gradients


def of_gate(raw_gate: Tensor, *args: Any) -> tuple[Callable[[], Tensor], ...]:
    of_x, of_A = gate_nats_gradients(raw_gate, *args)
    tokens = tuple(range(raw_gate.dim() - 2))
    return lambda: of_x, lambda: rows_added(of_A, tokens).sum(-1), lambda: rows_added(of_x, tokens)


def rows_added(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(axes) if axes else x


def of_cumulative_gate(raw_gate: Tensor, *args: Any) -> tuple[Callable[[], Tensor], ...]:
    """From the gradient of the gate that is added up; padding has none."""
    A_log, dt_bias, lower_bound, _, cu_seqlens, _, gradient = args
    real = real_rows(raw_gate, cu_seqlens, 0.0)
    return of_gate(real, A_log, dt_bias, lower_bound, gradient)


def of_l2norm(x: Tensor, eps: float, gradient: Tensor) -> tuple[Callable[[], Tensor]]:
    return (lambda: l2_normalized_gradient(x, eps, gradient),)


def of_rms_norm_gated(o: Tensor, *args: Any) -> tuple[Callable[[], Tensor], ...]:
    of_o, of_output_gate, of_weight = gated_rms_norm_gradients(o, *args)
    tokens = tuple(range(o.dim() - 1))
    return lambda: of_o, lambda: of_output_gate, lambda: rows_added(of_weight, tokens)


FORMULAS: dict[Any, Callable[..., Any]] = {
    gate_op: of_gate,
    l2norm_op: of_l2norm,
    rms_norm_gated_op: of_rms_norm_gated,
}


def lower_to_formula(op: Any) -> None:
    gradients, backward = as_operator(op, FORMULAS[op]), OPERATORS[op].backward
    launcher = None if backward is None else backward.launcher

    def lower(*args: Any) -> Any:
        if args[-2] is None:
            return call_operator(*args)
        if launcher is not None and on_gpu(args[0]):
            return inline_launcher(launcher, *args)
        return inline(gradients, args, fake_arguments())

    lowers(backward_of(op))(lower)


for op in FORMULAS:
    lower_to_formula(op)


@lowers(backward_of(chunk_cumsum_op))
def lower_chunk_cumsum_backward(*args: Any) -> Any:
    g, chunk_size, scale, *tables, gradient, needs = args
    if gradient is None or not needs[0] or not has_chunks(g, tables[0]):
        return call_operator(*args)
    wide = to_dtype(gradient, torch.promote_types(g.get_dtype(), torch.float32))
    return sums_in_chunks(wide, chunk_size, scale, tuple(tables), Direction(True, g.get_dtype()))


def gate_of_tokens(raw_gate: Tensor, *args: Any) -> Tensor:
    """The gate in nats that `gate_cumsum` adds up."""
    *parameters, _, cu_seqlens, _ = args
    return gate_nats(real_rows(raw_gate, cu_seqlens, 0.0), *parameters)


gate_gradients = as_operator(gate_cumsum_op, of_cumulative_gate)


@lowers(backward_of(gate_cumsum_op))
def lower_gate_cumsum_backward(*args: Any) -> Any:
    raw_gate, _, _, lower_bound, chunk_size, *tables, gradient, needs = args
    if gradient is None or not any(needs) or not has_chunks(raw_gate, tables[0]):
        return call_operator(*args)
    values = fake_arguments()
    acc = torch.promote_types(raw_gate.get_dtype(), torch.float32)
    gradient = to_dtype(gradient, acc)
    if lower_bound is None:  # a sum that overflowed is a constant
        g = inline(gate_of_tokens, args[:-2], values[:-2])
        G = sums_in_chunks(g, chunk_size, RCP_LN2, tuple(tables))
        finite = lowerings[aten.ge.Scalar](G, torch.finfo(acc).min)
        gradient = lowerings[aten.where.self](finite, gradient, 0.0)
    dg = sums_in_chunks(gradient, chunk_size, RCP_LN2, tuple(tables), Direction(reverse=True))
    with V.fake_mode:
        dg_value = torch.empty(values[0].shape, dtype=acc, device=values[0].device)
    return inline(gate_gradients, [*args[:-2], dg, needs], [*values[:-2], dg_value, needs])
