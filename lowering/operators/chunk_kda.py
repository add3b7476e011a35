"""Chunked KDA is two hand-written kernels."""

from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(chunk_kda_op)
lower_to_kernel(chunk_kda_state_op)
