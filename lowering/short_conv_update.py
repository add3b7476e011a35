"""The convolution update is one hand-written kernel, on its state in place."""

from kda_ops.short_conv_update.op import short_conv_update_op
from lowering.inline import lower_to_kernel

lower_to_kernel(short_conv_update_op)
