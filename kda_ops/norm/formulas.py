"""The norms in eager PyTorch, in the accumulation dtype."""

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype


def l2_normalized(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)


def gated_rms_norm(o: Tensor, output_gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate)` over the last axis, in the accumulation
    dtype.
    """
    acc = accumulation_dtype(o)
    wide = o.to(acc)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y * weight.to(acc) * torch.sigmoid(output_gate.to(acc))
