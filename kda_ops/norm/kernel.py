"""Triton functions of the norms."""

import triton


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of row `row` (int64) in a strided tensor of sizes `[_, size_1, size_2, ...]`."""
    leading = row // size_2
    return (
        (leading // size_1) * stride_0 + (leading % size_1) * stride_1 + (row % size_2) * stride_2
    )
