"""Formulas that more than one operator's reference uses, in eager PyTorch.

Everything accumulates in fp32, or in fp64 when the input is fp64: that is how the oracle is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
RCP_LN2 = 1.4426950408889634


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16, bf16 and fp32; fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def gate_nats(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The per-channel log decay in nats, `x [..., HV, K]`, in the accumulation dtype.

    `F.softplus` flushes `exp(z)` to 0 below -17 only in the naive form; with `log1p` it is exact down to the smallest normal number, and it is linear above 20.
    """
    acc = accumulation_dtype(x)
    z = x.to(acc)
    if dt_bias is not None:
        z = z + dt_bias.to(acc).reshape(x.shape[-2:])
    a = None if A_log is None else A_log.to(acc).exp().unsqueeze(-1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(z if a is None else a * z)
    softplus = F.softplus(z)
    return -softplus if a is None else -(a * softplus)
