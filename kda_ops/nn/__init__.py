"""The layer module, its checkpoints, and the layer over several ranks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kda_ops.nn.context import ContextParallel
    from kda_ops.nn.context_mixing import context_chunk_kda, context_history, context_short_conv
    from kda_ops.nn.parallel import HeadwiseParallel, parallelize
    from kda_ops.nn.state_dicts import state_dict_by_parts

__all__ = [
    "ContextParallel",
    "HeadwiseParallel",
    "context_chunk_kda",
    "context_history",
    "context_short_conv",
    "parallelize",
    "state_dict_by_parts",
]
_ON_FIRST_USE = {
    "ContextParallel": "kda_ops.nn.context",
    "HeadwiseParallel": "kda_ops.nn.parallel",  # loads DTensor
    "context_chunk_kda": "kda_ops.nn.context_mixing",
    "context_history": "kda_ops.nn.context_mixing",
    "context_short_conv": "kda_ops.nn.context_mixing",
    "parallelize": "kda_ops.nn.parallel",
    "state_dict_by_parts": "kda_ops.nn.state_dicts",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
