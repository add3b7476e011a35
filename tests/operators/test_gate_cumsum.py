"""The cumulative gate: the gate, then the cumsum, in log2."""

import math

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.varlen import prepare_chunk_indices
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close

LENGTHS = (100, 0, 1, 64, 33)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_definition_token_by_token() -> None:
    x, bias, A_log = torch.randn(1, 150, 2, 3), torch.randn(6), torch.randn(2)
    expected = torch.empty_like(x, dtype=torch.float64)
    for t in range(150):
        for h in range(2):
            for k in range(3):
                z = x[0, t, h, k].item() + bias[3 * h + k].item()
                log2_decay = -math.exp(A_log[h].item()) * math.log1p(math.exp(z)) / math.log(2)
                before = expected[0, t - 1, h, k].item() if t % 64 else 0.0
                expected[0, t, h, k] = before + log2_decay
    G = kda_ops.gate_cumsum(x, A_log, bias)
    assert_close(G, expected.float(), expected)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("varlen", [True, False])
def test_is_the_gate_then_the_cumsum(lower_bound: float | None, varlen: bool) -> None:
    x, bias = torch.randn(1, 300, 2, 3, dtype=torch.float64), torch.randn(2, 3)
    A_log = torch.randn(2)
    chunked = {"cu_seqlens": offsets(LENGTHS)} if varlen else {}
    g = kda_ops.gate(x, A_log, bias, lower_bound=lower_bound)
    expected = kda_ops.chunk_cumsum(g, **chunked) / math.log(2)
    G = kda_ops.gate_cumsum(x, A_log, bias, lower_bound=lower_bound, **chunked)
    assert_close(G, expected, expected)


def test_ragged_is_separate_sequences() -> None:
    x, A_log = torch.randn(1, sum(LENGTHS), 2, 3), torch.randn(2)
    separate = [kda_ops.gate_cumsum(part, A_log) for part in x.split(LENGTHS, dim=1)]
    assert torch.equal(
        kda_ops.gate_cumsum(x, A_log, cu_seqlens=offsets(LENGTHS)), torch.cat(separate, dim=1)
    )


def with_padding() -> dict:
    x = torch.randn(1, 300, 2, 3)
    x[:, sum(LENGTHS) :] = torch.nan
    return {"raw_gate": x, "A_log": torch.zeros(2), "cu_seqlens": offsets(LENGTHS)}


def assert_padding_is_zero(G: Tensor) -> None:
    real = sum(LENGTHS)
    assert (G[:, :real] < 0).all()
    assert torch.equal(G[:, real:], torch.zeros_like(G[:, real:]))


def test_padding() -> None:
    assert_padding_is_zero(kda_ops.gate_cumsum(**with_padding()))


@pytest.mark.interpreter
def test_padding_of_the_kernel() -> None:
    assert_padding_is_zero(run_kernels(kda_ops.gate_cumsum)(**with_padding()))


def test_padding_reaches_no_gradient() -> None:
    inputs = with_padding()
    inputs["raw_gate"].requires_grad_()
    inputs["A_log"].requires_grad_()
    kda_ops.gate_cumsum(**inputs).sum().backward()
    real = sum(LENGTHS)
    assert inputs["A_log"].grad.isfinite().all()
    assert inputs["raw_gate"].grad[:, :real].ne(0).all()
    assert torch.equal(inputs["raw_gate"].grad[:, real:], torch.zeros(1, 300 - real, 2, 3))


def test_gradients() -> None:
    x = torch.randn(1, 20, 1, 2, dtype=torch.float64, requires_grad=True)
    A_log = torch.randn(1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    G = lambda *args: kda_ops.gate_cumsum(*args, chunk_size=16)  # noqa: E731
    assert torch.autograd.gradcheck(G, (x, A_log, bias))


X, A = torch.zeros(1, 100, 2, 4), torch.zeros(2)
CU = offsets((40, 60))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], A), {}, r"raw_gate must have 4 dimensions, got shape \(100, 2, 4\)"),
        ((X.int(), A), {}, r"raw_gate must have dtype .*, got int32"),
        ((X, A[:1]), {}, r"A_log must have shape \[2\] or \[1, 1, 2, 1\], got \(1,\)"),
        ((X, None), {}, r"A_log must be given unless lower_bound is, got None"),
        ((X, A, torch.zeros(9)), {}, r"dt_bias must have shape \[2, 4\] or \[8\], got \(9,\)"),
        ((X, A), {"lower_bound": 1.0}, r"lower_bound must be None or in \[-5, 0\), got 1.0"),
        ((X, A), {"chunk_size": 8}, r"chunk_size must be a power of two from 16 to 256, got 8"),
        (
            (X, A),
            {"chunk_indices": prepare_chunk_indices(CU, 100)},
            r"chunk_indices must come with cu_seqlens",
        ),
        (
            (X.expand(3, -1, -1, -1), A),
            {"cu_seqlens": CU},
            r"raw_gate must have batch size 1 .*, got 3",
        ),
        ((X, A), {"cu_seqlens": CU + 2}, r"cu_seqlens must start at 0, got 2"),
        ((X, A), {"cu_seqlens": CU * 2}, r"cu_seqlens must end at or before 100 .*, got 200"),
    ],
)
def test_errors(args: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kda_ops.gate_cumsum(*args, **options)
