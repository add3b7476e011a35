"""The short convolution of new tokens against its state, in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.conv.formulas import conv_update


def short_conv_update_reference(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    state_indices: Tensor | None, num_accepted: Tensor | None, cu_seqlens: Tensor | None,
    layout: str,
) -> Tensor:  # fmt: skip
    if cu_seqlens is None:
        tokens = x.shape[1] if x.dim() == 3 else 1
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * tokens
    else:
        offsets = cu_seqlens.long()
    flat = x.reshape(-1, x.shape[-1])
    y = conv_update(
        flat, conv_state, weight, bias, activation, state_indices, num_accepted, offsets, layout
    )
    return y.reshape(x.shape)
