"""The short convolution of new tokens against its state."""

from kda_ops.conv.short_conv_update.op import short_conv_update

__all__ = ["short_conv_update"]
