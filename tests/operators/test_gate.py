"""The gate: its formula, its tails, its gradients, its errors."""

import math

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close


def one_gate(x: float, A_log: float | None, bias: float, lower_bound: float | None) -> float:
    """The formula for one number, in Python's own floating point."""
    a = 1.0 if A_log is None else math.exp(A_log)
    z = x + bias
    if lower_bound is not None:
        return lower_bound / (1 + math.exp(-a * z))
    return -a * (max(z, 0.0) + math.log1p(math.exp(-abs(z))))


@pytest.mark.parametrize("lower_bound", [None, -5.0, -0.5])
@pytest.mark.parametrize("rates", [True, False])
def test_definition(lower_bound: float | None, rates: bool) -> None:
    if lower_bound is None and not rates:
        lower_bound = -1.0
    x, bias = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    A_log = torch.randn(2, dtype=torch.float64) if rates else None
    expected = torch.empty_like(x)
    for t in range(3):
        for h in range(2):
            for k in range(4):
                rate = None if A_log is None else A_log[h].item()
                expected[t, h, k] = one_gate(
                    x[t, h, k].item(), rate, bias[h, k].item(), lower_bound
                )
    g = kda_ops.gate(x, A_log, bias, lower_bound=lower_bound)
    assert_close(g, expected, expected)
    flat = kda_ops.gate(x, A_log, bias.flatten(), lower_bound=lower_bound)
    assert torch.equal(flat, g)


def tails() -> Tensor:
    """Where a naive log(1 + exp(z)) is 0, where it is exact, and where its exp is infinite."""
    return torch.cat(
        [torch.arange(-80.0, -16.0), torch.linspace(-16, 20, 301), torch.arange(20.0, 120.0)]
    )


def assert_tails_are_right(x: Tensor, g: Tensor) -> None:
    """Every value has a small error relative to itself, not to the largest."""
    expected = torch.tensor([one_gate(z, 0.0, 0.0, None) for z in x.flatten().tolist()]).double()
    relative = (g.flatten().double() / expected - 1).abs()
    # exp(z) inherits |z| roundings of its argument from z * log2(e)
    roundings = 2 + x.flatten().double().abs()
    assert (relative <= torch.finfo(torch.float32).eps * roundings).all()
    assert (g < 0).all()


def test_tails_of_the_reference() -> None:
    x = tails().reshape(-1, 1, 1)
    assert_tails_are_right(x, kda_ops.gate(x, torch.zeros(1)))


def test_tails_compiled() -> None:
    x = tails().reshape(-1, 1, 1)
    assert_tails_are_right(x, torch.compile(kda_ops.gate, fullgraph=True)(x, torch.zeros(1)))


@pytest.mark.interpreter
def test_tails_of_the_kernel() -> None:
    x = tails().reshape(-1, 1, 1)
    assert_tails_are_right(x, run_kernels(kda_ops.gate)(raw_gate=x, A_log=torch.zeros(1)))


@pytest.mark.gpu
def test_tails_on_the_gpu() -> None:
    x = tails().reshape(-1, 1, 1)
    assert_tails_are_right(x, kda_ops.gate(x.cuda(), torch.zeros(1).cuda()).cpu())


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradients(lower_bound: float | None) -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    A_log = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gate = lambda *args: kda_ops.gate(*args, lower_bound=lower_bound)  # noqa: E731
    assert torch.autograd.gradcheck(gate, (x, A_log, bias))


def test_gradient_of_the_tails_is_finite() -> None:
    x = tails().reshape(-1, 1, 1).requires_grad_()
    kda_ops.gate(x, torch.zeros(1)).sum().backward()
    z = x.detach()
    assert_close(x.grad, -torch.sigmoid(z), -torch.sigmoid(z.double()))


X, A, BIAS = torch.zeros(1, 5, 2, 4), torch.zeros(2), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X.int(), A), {}, r"raw_gate must have dtype .*, got int32"),
        ((X[0, 0, 0], A), {}, r"raw_gate must have shape \[\.\.\., HV, K\], got \(4,\)"),
        ((X, torch.zeros(3)), {}, r"A_log must have shape \[2\] or \[1, 1, 2, 1\], got \(3,\)"),
        ((X, A.long()), {}, r"A_log must have dtype .*, got int64"),
        ((X, None), {}, r"A_log must be given unless lower_bound is, got None"),
        ((X, A, torch.zeros(4, 2)), {}, r"dt_bias must have shape \[2, 4\] or \[8\], got \(4, 2\)"),
        ((X, A, BIAS.bool()), {}, r"dt_bias must have dtype .*, got bool"),
        ((X, A, BIAS.to("meta")), {}, r"dt_bias must be on cpu like raw_gate, got meta"),
        ((X, A), {"lower_bound": 0.0}, r"lower_bound must be None or in \[-5, 0\), got 0.0"),
        ((X, A), {"lower_bound": -6.0}, r"lower_bound must be None or in \[-5, 0\), got -6.0"),
    ],
)
def test_errors(args: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kda_ops.gate(*args, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 4), (0, 3, 4)])
def test_kernel_of_an_empty_axis(shape: tuple[int, ...]) -> None:
    g = run_kernels(kda_ops.gate)(raw_gate=torch.zeros(shape), A_log=torch.zeros(shape[1]))
    assert g.shape == shape
