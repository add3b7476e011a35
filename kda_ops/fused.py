"""Fused operators: produced by graph rewrites; experts may call them directly.

They take raw projections (`raw_gate`, `raw_beta`) where the operators of `kda_ops` take activated
values (`g`, `beta`).
"""

from kda_ops.conv.short_conv_qkv import short_conv_qkv
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.chunk_kda_gated_affine import chunk_kda_gated_affine
from kda_ops.delta_rule.kda_decode import kda_decode

__all__ = ["chunk_kda_gated", "chunk_kda_gated_affine", "kda_decode", "short_conv_qkv"]
