"""The norms in eager PyTorch, in the accumulation dtype."""

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype


def l2_normalized(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)


def l2_normalized_gradient(x: Tensor, eps: float, gradient: Tensor) -> Tensor:
    """The gradient of x, from that of `l2_normalized`, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x))
    gradient = gradient.to(wide.dtype)
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    y = wide * scale
    return scale * (gradient - y * (gradient * y).sum(-1, keepdim=True))


def gated_rms_norm(o: Tensor, output_gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate)` over the last axis, in the accumulation
    dtype.
    """
    acc = accumulation_dtype(o)
    wide = o.to(acc)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y * weight.to(acc) * torch.sigmoid(output_gate.to(acc))


def gated_rms_norm_gradients(
    o: Tensor, output_gate: Tensor, weight: Tensor, eps: float, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of o and the gate and, row by row, of the weight, from that of
    `gated_rms_norm`, in the accumulation dtype.
    """
    acc = accumulation_dtype(o)
    wide, gradient = o.to(acc), gradient.to(acc)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y, gate = wide * scale, torch.sigmoid(output_gate.to(acc))
    of_weight = gradient * y * gate
    inner = gradient * weight.to(acc) * gate
    of_o = scale * (inner - y * (inner * y).mean(-1, keepdim=True))
    return of_o, of_weight * weight.to(acc) * (1 - gate), of_weight
