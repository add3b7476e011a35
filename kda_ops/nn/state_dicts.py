"""State dicts of whole models, in the form that parallel ones have."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.nn.parts import PACKED, split_weight


def state_dict_by_parts(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model whose KDA layers are not parallel, by the names of one whose are.

    Its tensors are views of the model's: `torch.distributed.checkpoint.load` into it fills the
    model with what any number of ranks have saved, and `save` from it is read by any number.

    Args:
        model: A layer, or a model with layers. Those that are parallel already stay as they are.

    Returns:
        A new dict.
    """
    return by_parts(model, model.state_dict())


def by_parts(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of a model's parameters, with packed ones as views of their parts."""
    found = dict(tensors)
    for path, layer in model.named_modules():
        if not isinstance(layer, KimiDeltaAttention):
            continue
        prefix = f"{path}." if path else ""
        for packed in PACKED:
            if (weight := found.pop(prefix + packed, None)) is not None:
                parts = split_weight(layer, packed, weight)
                found |= {prefix + name: part for name, part in parts.items()}
    return found
