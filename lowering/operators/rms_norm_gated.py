"""Gated RMSNorm is a reduction and pointwise work: as IR it fuses with its neighbours."""

from typing import Any

from kda_ops.lowering.inline import inline_reference, lowers
from kda_ops.norm.rms_norm_gated.op import rms_norm_gated_op
from kda_ops.norm.rms_norm_gated.reference import rms_norm_gated_reference


@lowers(rms_norm_gated_op)
def lower_rms_norm_gated(*args: Any) -> Any:
    return inline_reference(rms_norm_gated_reference, *args)
