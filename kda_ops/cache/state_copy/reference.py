"""The state copy in eager PyTorch: definition and CPU implementation."""

import torch
from torch import Tensor

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_copy_reference(
    conv: Tensor, recurrent: Tensor, plan: Tensor, layout: str, max_bias: int
) -> None:
    """Reads every source before writing anything, so that a slot may shift in place."""
    if conv.dim() == 3:
        conv, recurrent = conv[None], recurrent[None]
    if layout == "DS":
        conv = conv.transpose(-1, -2)
    # as integers, every dtype can be gathered and scattered
    conv = conv.view(INTEGER_OF_SIZE[conv.element_size()])  # [layers, slots, L, D]
    recurrent = recurrent.view(INTEGER_OF_SIZE[recurrent.element_size()])
    conv_src, recurrent_src, dst, bias = plan.long().unbind(1)
    slots = conv.shape[1]
    live = (dst > 0) & (dst < slots) & (bias >= 0) & (bias <= max_bias)

    rows = live & (conv_src >= 0) & (conv_src < slots) & ((conv_src != dst) | (bias != 0))
    shifted_row = torch.arange(conv.shape[2], device=plan.device) + bias[rows, None]  # [R, L]
    kept = shifted_row < conv.shape[2]
    source = conv[:, conv_src[rows, None], shifted_row.where(kept, 0)]  # [layers, R, L, D]
    conv[:, dst[rows]] = torch.where(kept[..., None], source, conv[:, dst[rows]])

    rows = live & (recurrent_src >= 0) & (recurrent_src < slots) & (recurrent_src != dst)
    recurrent[:, dst[rows]] = recurrent[:, recurrent_src[rows]]
