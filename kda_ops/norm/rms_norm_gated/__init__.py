"""Gated RMSNorm of the attention output."""

from kda_ops.norm.rms_norm_gated.op import rms_norm_gated

__all__ = ["rms_norm_gated"]
