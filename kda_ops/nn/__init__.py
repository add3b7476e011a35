"""The layer module, its checkpoints, and the layer over several ranks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kda_ops.nn.parallel import HeadwiseParallel, parallelize
    from kda_ops.nn.state_dicts import state_dict_by_parts

__all__ = ["HeadwiseParallel", "parallelize", "state_dict_by_parts"]
_ON_FIRST_USE = {
    "HeadwiseParallel": "kda_ops.nn.parallel",  # loads DTensor
    "parallelize": "kda_ops.nn.parallel",
    "state_dict_by_parts": "kda_ops.nn.state_dicts",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
