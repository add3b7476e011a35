"""Kimi Delta Attention as operators that torch.compile understands.

Importing this package loads neither Triton nor Inductor.
"""

from kda_ops.cache.conv_split import conv_split
from kda_ops.cache.state_copy import state_copy
from kda_ops.conv.short_conv import short_conv
from kda_ops.conv.short_conv_qkv import short_conv_qkv
from kda_ops.conv.short_conv_update import short_conv_update
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.kda_decode import kda_decode
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.explain import explain
from kda_ops.gating.chunk_cumsum import chunk_cumsum
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.norm.l2norm import l2norm
from kda_ops.norm.rms_norm_gated import rms_norm_gated

__all__ = [
    "chunk_cumsum",
    "chunk_kda",
    "chunk_kda_gated",
    "conv_split",
    "explain",
    "gate",
    "gate_cumsum",
    "kda_decode",
    "l2norm",
    "recurrent_kda",
    "rms_norm_gated",
    "short_conv",
    "short_conv_qkv",
    "short_conv_update",
    "state_copy",
]
