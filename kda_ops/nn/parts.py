"""Two forms of the same weights in a state dict: packed, and by parts.

A `KimiDeltaAttention` has packed weights: `in_proj.weight` with the rows q | k | v | f | g | b |
pad, `conv_weight` and `conv_bias` with the channels q | k | v. A layer that
`kda_ops.nn.parallelize` has sharded has each part for itself, `in_proj.q`, `conv_weight.k`, ...,
whose rows are those of one kind of head. Either kind of layer loads either form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from kda_ops.nn.layer import KimiDeltaAttention as Layer

PACKED = {"in_proj.weight": "in_proj", "conv_weight": "conv_weight", "conv_bias": "conv_bias"}


def part_sizes(layer: Layer, packed: str) -> dict[str, int]:
    """The rows of a packed weight by part, over all ranks, `pad` included."""
    if packed == "in_proj.weight":
        return layer.in_sizes
    return {name: layer.in_sizes[name] for name in "qkv"}


def split_weight(layer: Layer, packed: str, weight: Tensor) -> dict[str, Tensor]:
    """Views of a packed weight by the names of its parts, without `pad`."""
    sizes = part_sizes(layer, packed)
    parts = dict(zip(sizes, weight.split(list(sizes.values())), strict=True))
    parts.pop("pad", None)
    return {f"{PACKED[packed]}.{name}": part for name, part in parts.items()}


def join_parts(layer: Layer, state_dict: MutableMapping[str, Any], prefix: str = "") -> None:
    """Replaces parts in a state dict by packed weights, where all parts of one are there. DTensors
    are gathered for a layer that is whole.
    """
    for name, p in layer.named_parameters():
        x = state_dict.get(prefix + name)
        if x is not None and not hasattr(p, "full_tensor"):
            state_dict[prefix + name] = whole(x)
    for packed, base in PACKED.items():
        sizes = part_sizes(layer, packed)
        names = [f"{prefix}{base}.{name}" for name in sizes if name != "pad"]
        if not all(name in state_dict for name in names):
            continue
        rows = [whole(state_dict.pop(name)) for name in names]
        if sizes.get("pad"):
            rows.append(rows[0].new_zeros(sizes["pad"], *rows[0].shape[1:]))
        state_dict[prefix + packed] = torch.cat(rows)


def whole(x: Any) -> Any:
    """A tensor with the values of all ranks; everything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
