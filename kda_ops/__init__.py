"""Kimi Delta Attention as operators that torch.compile understands.

Importing this package loads neither Triton nor Inductor.
"""

from kda_ops.chunk_cumsum import chunk_cumsum
from kda_ops.gate import gate
from kda_ops.gate_cumsum import gate_cumsum
from kda_ops.l2norm import l2norm
from kda_ops.recurrent_kda import recurrent_kda
from kda_ops.rms_norm_gated import rms_norm_gated

__all__ = ["chunk_cumsum", "gate", "gate_cumsum", "l2norm", "recurrent_kda", "rms_norm_gated"]
