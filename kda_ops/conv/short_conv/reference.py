"""The short convolution of whole sequences in eager PyTorch."""

from kda_ops.conv.formulas import conv_whole as short_conv_reference
from kda_ops.conv.formulas import conv_whole_state as short_conv_state_reference

__all__ = ["short_conv_reference", "short_conv_state_reference"]
