"""L2 normalisation is a reduction and pointwise work: as IR it fuses with its neighbours."""

from typing import Any

from kda_ops.lowering.inline import inline_reference, lowers
from kda_ops.norm.l2norm.op import l2norm_op
from kda_ops.norm.l2norm.reference import l2norm_reference


@lowers(l2norm_op)
def lower_l2norm(*args: Any) -> Any:
    return inline_reference(l2norm_reference, *args)
