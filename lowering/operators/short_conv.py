"""The short convolution of whole sequences is one hand-written kernel.

As IR its taps are W shifted reads of x, which Inductor turns into twice the time of the kernel that
keeps a sliding window in registers.
"""

from kda_ops.conv.short_conv.op import short_conv_op, short_conv_state_op
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(short_conv_op)
lower_to_kernel(short_conv_state_op)
