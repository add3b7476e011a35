"""The L2 norm: definition, gradients, errors."""

import math

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.oracle import assert_close


def test_definition() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    expected = torch.empty_like(x)
    for i in range(3):
        for h in range(2):
            row = x[i, h].tolist()
            length = math.sqrt(sum(value * value for value in row) + 0.25)
            expected[i, h] = x[i, h] / length
    y = kda_ops.l2norm(x, eps=0.25)
    assert_close(y, expected, expected)


def test_a_zero_row_stays_zero() -> None:
    assert torch.equal(kda_ops.l2norm(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_result_is_contiguous_and_new() -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=-1)
    y = kda_ops.l2norm(x.transpose(0, 1), eps=0.0)
    assert y.is_contiguous()
    assert y.data_ptr() != x.data_ptr()


def test_gradients() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kda_ops.l2norm, x)


@pytest.mark.parametrize(
    ("x", "eps", "message"),
    [
        (torch.zeros(2, 4).int(), 1e-6, r"x must have dtype .*, got int32"),
        (torch.zeros(()), 1e-6, r"x must have shape \[\.\.\., K\], got \(\)"),
        (torch.zeros(2, 4), -1.0, r"eps must not be negative, got -1.0"),
    ],
)
def test_errors(x: Tensor, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kda_ops.l2norm(x, eps=eps)
