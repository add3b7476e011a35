"""Triton functions of the norms."""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter looks for it here
from torch import Tensor


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of row `row` (int64) in a strided tensor of sizes `[_, size_1, size_2, ...]`."""
    leading = row // size_2
    return (
        (leading // size_1) * stride_0 + (leading % size_1) * stride_1 + (row % size_2) * stride_2
    )


def four_axes(x: Tensor) -> Tensor:
    """A view with four axes where x has up to three leading ones; the last is dense."""
    x = x.reshape(-1, *x.shape[-3:]) if x.dim() > 3 else x[(None,) * (4 - x.dim())]
    return x if x.stride(3) == 1 else x.contiguous()
