"""The cumulative gate: its hand-written kernel on a GPU, its own implementation elsewhere."""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.gate_cumsum.op import gate_cumsum_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(gate_cumsum_op)
def lower_gate_cumsum(*args: Any) -> Any:
    if on_gpu(args[0]):
        return inline_launcher(OPERATORS[gate_cumsum_op].launcher, *args)
    return call_operator(*args)
