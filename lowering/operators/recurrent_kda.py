"""The recurrence is one hand-written kernel, on its state in place."""

from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(recurrent_kda_op)
