"""The state copy is one hand-written kernel, on its states in place."""

from kda_ops.cache.state_copy.op import state_copy_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(state_copy_op)
