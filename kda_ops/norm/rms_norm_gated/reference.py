"""Gated RMSNorm in eager PyTorch."""

from torch import Tensor

from kda_ops.norm.formulas import gated_rms_norm


def rms_norm_gated_reference(o: Tensor, output_gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gated_rms_norm(o, output_gate, weight, eps).to(o.dtype).contiguous()
