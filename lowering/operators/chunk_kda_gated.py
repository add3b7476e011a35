"""Chunked KDA from raw inputs is two hand-written kernels."""

from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(chunk_kda_gated_op)
lower_to_kernel(chunk_kda_gated_state_op)
