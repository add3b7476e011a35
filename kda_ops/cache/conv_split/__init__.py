"""The q, k and v parts of a convolution state."""

from kda_ops.cache.conv_split.op import conv_split

__all__ = ["conv_split"]
