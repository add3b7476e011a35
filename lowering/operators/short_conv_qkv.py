"""The short convolution with the norms of q and k is one hand-written kernel."""

from kda_ops.conv.short_conv_qkv.op import (
    short_conv_qkv_op,
    short_conv_qkv_state_op,
    short_conv_qkv_unpacked_op,
    short_conv_qkv_unpacked_state_op,
)
from kda_ops.lowering.inline import lower_to_kernel

lower_to_kernel(short_conv_qkv_op)
lower_to_kernel(short_conv_qkv_state_op)
lower_to_kernel(short_conv_qkv_unpacked_op)
lower_to_kernel(short_conv_qkv_unpacked_state_op)
