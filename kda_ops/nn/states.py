"""The states that a layer allocates when a call requests states without passing any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.config import AUTO, configured_layout

if TYPE_CHECKING:
    from kda_ops.nn.layer import KimiDeltaAttention as Layer

State = tuple[Tensor | None, Tensor]


def fresh_layout(layer: Layer, x: Tensor) -> str:
    """The layout of a fresh state."""
    layout = configured_layout(layer.conv_layout)
    if layout != AUTO or not layer.use_short_conv:
        return layout
    from kda_ops.cache.layout_autotune import faster_layout  # loads Dynamo

    return faster_layout(
        layer.num_heads,
        layer.num_v_heads,
        layer.head_k_dim,
        layer.head_v_dim,
        layer.conv_size,
        0,
        str(conv_state_dtype(layer, x)),
        str(accumulation_dtype(x)),
        str(x.device),
    )


def conv_state_dtype(layer: Layer, x: Tensor) -> torch.dtype:
    """The dtype of a fresh convolution state: that of the weights, as in the spec."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return layer.in_proj.weight.dtype if autocast else x.dtype


def fresh_state(layer: Layer, slots: int, x: Tensor, layout: str) -> State:
    """Zeroed states for `slots`, without the padding of pages."""
    conv = None
    if layer.use_short_conv:
        L = layer.conv_size - 1
        conv_shape = (L, layer.conv_dim) if layout == "SD" else (layer.conv_dim, L)
        conv = x.new_zeros((slots, *conv_shape), dtype=conv_state_dtype(layer, x))
    shape = (slots, layer.num_v_heads, layer.head_v_dim, layer.head_k_dim)
    return conv, x.new_zeros(shape, dtype=accumulation_dtype(x))
