"""The bounds checker for kernels detects what it should."""

from typing import Any

import pytest
import torch

from tests.support.bounds import within_tensors


def kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, first, last, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE) - 1
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i >= first), mask=(i >= 0) & (i < last))

    return copy_kernel


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("first", "last", "error"),
    [(0, 7, None), (0, 6, None), (-1, 7, "1 of 8")],
    ids=str,
)
def test_a_read_outside(first: int, last: int, error: str | None) -> None:
    x, y = torch.arange(7.0), torch.zeros(8)
    with within_tensors():
        if error is None:
            kernel()[(1,)](x, y, first, last, SIZE=8)
            assert torch.equal(y[: min(last, 7)], x[: min(last, 7)])
        else:
            with pytest.raises(Exception, match=f"{error} elements lie outside"):
                kernel()[(1,)](x, y, first, last, SIZE=8)


@pytest.mark.interpreter
def test_a_write_outside() -> None:
    with within_tensors(), pytest.raises(Exception, match="1 of 7 elements lie outside"):
        kernel()[(1,)](torch.arange(7.0), torch.zeros(6), 0, 7, SIZE=8)
