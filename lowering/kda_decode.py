"""The whole decode step is one hand-written kernel, on its states in place."""

from kda_ops.kda_decode.op import kda_decode_apart_op, kda_decode_op
from lowering.inline import lower_to_kernel

lower_to_kernel(kda_decode_op)
lower_to_kernel(kda_decode_apart_op)
