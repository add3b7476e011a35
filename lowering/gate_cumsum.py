"""The cumulative gate is one hand-written kernel."""

from kda_ops.gate_cumsum.op import gate_cumsum_op
from lowering.inline import lower_to_kernel

lower_to_kernel(gate_cumsum_op)
