"""The convolution update is one hand-written kernel, on its state in place."""

from kda_ops.conv.short_conv_update.op import short_conv_update_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(short_conv_update_op)
