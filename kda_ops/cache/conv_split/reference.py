"""The parts of a convolution state in eager PyTorch."""

import torch
from torch import Tensor


def conv_split_reference(conv_state: Tensor, sizes: list[int], layout: str) -> list[Tensor]:
    parts = conv_state.split(sizes, dim=2 if layout == "SD" else 1)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]
