"""The state copy is one hand-written kernel, on its states in place."""

from kda_ops.state_copy.op import state_copy_op
from lowering.inline import lower_to_kernel

lower_to_kernel(state_copy_op)
