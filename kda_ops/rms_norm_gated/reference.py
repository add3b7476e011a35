"""Gated RMSNorm in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.formulas import accumulation_dtype


def rms_norm_gated_reference(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    acc = accumulation_dtype(o)
    wide = o.to(acc)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(acc) * torch.sigmoid(gate.to(acc))).to(o.dtype).contiguous()
