"""The short convolution of q, k and v with the norms of q and k."""

from kda_ops.conv.short_conv_qkv.op import short_conv_qkv

__all__ = ["short_conv_qkv"]
