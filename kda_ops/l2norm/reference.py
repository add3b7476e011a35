"""L2 normalisation in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.formulas import accumulation_dtype


def l2norm_reference(x: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return y.to(x.dtype).contiguous()
