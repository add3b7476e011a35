"""Gated RMSNorm: definition, gradients, errors."""

import math

import pytest
import torch

import kda_ops
from tests.support.oracle import assert_close


def test_definition() -> None:
    o, gate = torch.randn(2, 3, 2, 5, dtype=torch.float64).unbind(0)
    weight = torch.randn(5, dtype=torch.float64)
    expected = torch.empty_like(o)
    for t in range(3):
        for h in range(2):
            row = o[t, h].tolist()
            root = math.sqrt(sum(value * value for value in row) / 5 + 0.25)
            for v in range(5):
                sigmoid = 1 / (1 + math.exp(-gate[t, h, v].item()))
                expected[t, h, v] = row[v] / root * weight[v].item() * sigmoid
    y = kda_ops.rms_norm_gated(o, gate, weight, eps=0.25)
    assert_close(y, expected, expected)


def test_a_closed_gate_is_zero_and_an_open_one_is_the_norm() -> None:
    o, weight = torch.randn(4, 8), torch.ones(8)
    closed = kda_ops.rms_norm_gated(o, torch.full((4, 8), -torch.inf), weight)
    assert torch.equal(closed, torch.zeros(4, 8))
    opened = kda_ops.rms_norm_gated(o, torch.full((4, 8), torch.inf), weight)
    norm = torch.nn.functional.rms_norm(o, (8,), weight, 1e-5)
    assert_close(opened, norm, torch.nn.functional.rms_norm(o.double(), (8,), None, 1e-5))


def test_gradients() -> None:
    o = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kda_ops.rms_norm_gated, (o, gate, weight))


O, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("args", "eps", "message"),
    [
        ((O.int(), O, W), 1e-5, r"o must have dtype .*, got int32"),
        ((O, O.int(), W), 1e-5, r"gate must have dtype .*, got int32"),
        ((O, O, W.int()), 1e-5, r"weight must have dtype .*, got int32"),
        ((O[0, 0, 0], O, W), 1e-5, r"o must have shape \[\.\.\., V\], got \(\)"),
        ((O, O[:1], W), 1e-5, r"gate must have shape \[2, 3, 4\], got \(1, 3, 4\)"),
        ((O, O, W[:3]), 1e-5, r"weight must have shape \[4\], got \(3,\)"),
        ((O, O, W.to("meta")), 1e-5, r"weight must be on cpu like o, got meta"),
        ((O, O, W), -1.0, r"eps must not be negative, got -1.0"),
    ],
)
def test_errors(args: tuple, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kda_ops.rms_norm_gated(*args, eps=eps)
