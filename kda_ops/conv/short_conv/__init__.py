"""The short convolution of whole sequences, with or without a state."""

from kda_ops.conv.short_conv.op import short_conv

__all__ = ["short_conv"]
