"""The cumulative gate on a GPU: its hand-written kernel, or IR that fuses with its neighbours."""

from collections.abc import Callable
from typing import Any

import torch

from kda_ops._numerics import RCP_LN2
from kda_ops._registry import OPERATORS
from kda_ops.gating.gate.reference import gate_reference
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.lowering.inline import (
    call_operator,
    compile_call,
    fake_arguments,
    inline_launcher,
    inline_reference,
    lowers,
    on_gpu,
)
from kda_ops.lowering.operators.chunk_cumsum import has_chunks, sums_in_chunks
from kda_ops.tuning import choose
from kda_ops.tuning.example_inputs import examples

FORM = "gate_cumsum.form"


def form_of(args: tuple[Any, ...]) -> str:
    """`"kernel"` or `"scan"`, from the fake arguments of a call."""
    x, _, _, lower_bound, chunk_size, cu_seqlens, _ = args

    def bench(values: dict[str, Any]) -> Callable[[], Any]:
        inputs = examples(OPERATORS[gate_cumsum_op].parameters, args, x.device)
        if values["form"] == "kernel":
            return lambda: gate_cumsum_op(*inputs)
        return compile_call(gate_cumsum_op, inputs, {FORM: values})

    chosen = choose(
        FORM,
        x.device,
        bench=bench,
        D=x.shape[2] * x.shape[3],
        C=chunk_size,
        dtype=x.dtype,
        bounded=lower_bound is not None,
        varlen=cu_seqlens is not None,
    )
    return str(chosen["form"])


def lower_scan(*args: Any) -> Any:
    *_, lower_bound, chunk_size, cu_seqlens, chunk_indices = args

    def gate(*values: Any) -> Any:
        g = gate_reference(*values[:4])
        if lower_bound is not None:
            return g
        return g.clamp(min=torch.finfo(g.dtype).min / (2 * chunk_size))  # whose sums are finite

    g = inline_reference(gate, *args)
    return sums_in_chunks(g, chunk_size, RCP_LN2, (cu_seqlens, chunk_indices))


@lowers(gate_cumsum_op)
def lower_gate_cumsum(*args: Any) -> Any:
    if not on_gpu(args[0]):
        return call_operator(*args)
    if has_chunks(args[0], args[5]) and form_of(fake_arguments()) == "scan":
        return lower_scan(*args)
    return inline_launcher(OPERATORS[gate_cumsum_op].launcher, *args)
