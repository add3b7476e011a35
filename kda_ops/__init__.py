"""Kimi Delta Attention, native to `torch.compile`.

Importing this package loads neither Triton nor Inductor. `kda_ops.fused` has the operators that
graph rewrites produce; modules and serving classes are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kda_ops import fused
from kda_ops.cache.conv_split import conv_split
from kda_ops.cache.state_copy import state_copy
from kda_ops.config import reference
from kda_ops.conv.short_conv import short_conv
from kda_ops.conv.short_conv_update import short_conv_update
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.explain import explain
from kda_ops.gating.chunk_cumsum import chunk_cumsum
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.norm.l2norm import l2norm
from kda_ops.norm.rms_norm_gated import rms_norm_gated
from kda_ops.varlen import prepare_chunk_indices

if TYPE_CHECKING:
    from kda_ops.cache.batch import KDABatch
    from kda_ops.cache.spec import KDAStateSpec
    from kda_ops.integrations.loading import load_kimi_linear
    from kda_ops.nn.layer import KimiDeltaAttention

__version__ = "0.1.0"
__all__ = [
    "KDABatch",
    "KDAStateSpec",
    "KimiDeltaAttention",
    "chunk_cumsum",
    "chunk_kda",
    "conv_split",
    "explain",
    "fused",
    "gate",
    "gate_cumsum",
    "l2norm",
    "load_kimi_linear",
    "prepare_chunk_indices",
    "recurrent_kda",
    "reference",
    "rms_norm_gated",
    "short_conv",
    "short_conv_update",
    "state_copy",
]
_ON_FIRST_USE = {
    "KDABatch": "kda_ops.cache.batch",
    "KDAStateSpec": "kda_ops.cache.spec",
    "KimiDeltaAttention": "kda_ops.nn.layer",
    "load_kimi_linear": "kda_ops.integrations.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    globals()[name] = found
    return found
