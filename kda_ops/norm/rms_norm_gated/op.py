"""Gated RMSNorm: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import check_device, check_dtype, check_not_negative, check_shape
from kda_ops._registry import define_op, selected
from kda_ops.norm.rms_norm_gated.reference import rms_norm_gated_reference


def rms_norm_gated_fake(o: Tensor) -> Tensor:
    return torch.empty(o.shape, dtype=o.dtype, device=o.device)


rms_norm_gated_op = define_op(
    "rms_norm_gated(Tensor o, Tensor output_gate, Tensor weight, float eps) -> Tensor",
    reference=rms_norm_gated_reference,
    fake=rms_norm_gated_fake,
    cuda="kda_ops.norm.rms_norm_gated.kernel:launch_rms_norm_gated",
    cuda_backward="kda_ops.norm.rms_norm_gated.backward:launch_rms_norm_gated_backward",
)


def rms_norm_gated(o: Tensor, output_gate: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate)` over the last axis: the output norm of a
    KDA head.

    Source: Kimi Linear (arXiv:2510.26692), section 4, output gate.

    Args:
        o: `[..., V]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides. Up to three leading axes
            of any strides are read in place.
        output_gate: Shape of `o`, any of these dtypes, before its sigmoid.
        weight: `[V]`, any of these dtypes.
        eps: Added to the mean of squares, not negative.

    Returns:
        `[..., V]`, dtype of `o`, contiguous; computed in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: An invalid shape, dtype, device or `eps`.
    """
    for name, x in (("o", o), ("output_gate", output_gate), ("weight", weight)):
        check_dtype(name, x)
    if o.dim() < 1:
        raise ValueError(f"o must have shape [..., V], got {tuple(o.shape)}")
    check_shape("output_gate", output_gate, o.shape)
    check_shape("weight", weight, (o.shape[-1],))
    check_device(o=o, output_gate=output_gate, weight=weight)
    check_not_negative("eps", eps)
    return selected(rms_norm_gated_op)(o, output_gate, weight, eps)
