"""Constants and dtypes shared by all families."""

import torch
from torch import Tensor

CHUNK = 64
RCP_LN2 = 1.4426950408889634
QK_NORM_EPS = 1e-6  # of the norms of q and k, under the root


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16, bf16 and fp32; fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
