"""The gate is pointwise: as IR it fuses with its producer and its consumer."""

from typing import Any

from kda_ops.gating.gate.op import gate_op
from kda_ops.gating.gate.reference import gate_reference
from kda_ops.lowering.inline import inline_reference, lowers


@lowers(gate_op)
def lower_gate(*args: Any) -> Any:
    return inline_reference(gate_reference, *args)
