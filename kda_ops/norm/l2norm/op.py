"""The L2 norm: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import check_dtype, check_not_negative
from kda_ops._registry import define_op, selected
from kda_ops.norm.l2norm.reference import l2norm_reference


def l2norm_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


l2norm_op = define_op(
    "l2norm(Tensor x, float eps) -> Tensor",
    reference=l2norm_reference,
    fake=l2norm_fake,
    cuda="kda_ops.norm.l2norm.kernel:launch_l2norm",
)


def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, as KDA applies it to queries and keys.

    Source: Kimi Linear (arXiv:2510.26692), section 4.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides. Up to three leading axes
            of any strides are read in place.
        eps: Added to the sum of squares, not negative.

    Returns:
        `[..., K]`, dtype of `x`, contiguous; the sum is accumulated in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: An invalid shape, dtype or `eps`.
    """
    check_dtype("x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., K], got {tuple(x.shape)}")
    check_not_negative("eps", eps)
    return selected(l2norm_op)(x, eps)
