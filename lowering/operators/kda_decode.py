"""The whole decode step is one hand-written kernel, on its states in place."""

from kda_ops.delta_rule.kda_decode.op import kda_decode_op, kda_decode_unpacked_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(kda_decode_op)
lower_to_kernel(kda_decode_unpacked_op)
