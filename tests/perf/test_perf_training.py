"""Benchmarks of training without a GPU: baselines with stand-ins, errors of gradients."""

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._numerics import RCP_LN2
from perf import bench_training, bench_training_accuracy
from perf.baselines import cudnn as baseline
from perf.bench_core import NAMES, core, core_inputs
from perf.harness import accuracy
from perf.harness.gradients import UnavailableError
from perf.harness.rows import (
    AGREEMENT,
    OURS,
    Inputs,
    Prepare,
    Row,
    check,
    relative_error,
    tensors,
)

CPU = torch.device("cpu")
CUDNN = "cuDNN frontend 1.32.0, activated gates"


def small(lengths: tuple[int, ...] = (70,), lower_bound: float | None = None) -> Inputs:
    torch.manual_seed(0)
    return bench_training.with_gradient(core_inputs(CPU, lengths, 2, lower_bound))


def their_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """What cuDNN's takes: packed tokens, gates in nats and beta in fp32."""
    assert q.dim() == k.dim() == v.dim() == g.dim() == 3
    assert (g.dtype, beta.dtype, cu_seqlens.dtype) == (torch.float32, torch.float32, torch.int32)
    assert cu_seqlens.tolist() == [0, len(q)]
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    q, k, v, g, beta = (x.unsqueeze(0) for x in (q, k, v, g, beta))
    G = kda_ops.chunk_cumsum(g, scale=RCP_LN2)
    return kda_ops.chunk_kda(q, k, v, G, beta.to(q.dtype))[0].squeeze(0), q.new_empty(0)


@pytest.fixture
def _cudnn_installed() -> Iterator[None]:
    parent, package = ModuleType("cudnn"), ModuleType("cudnn.linear_attention")
    package.kimi_delta_attention = their_chunks  # type: ignore[attr-defined]
    parent.linear_attention = package  # type: ignore[attr-defined]
    modules = {"cudnn": parent, "cudnn.linear_attention": package}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(baseline, "version", return_value="1.32.0"),
    ):
        yield


def our_gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = bench_training_accuracy.gradients_of(core)(inputs)()[1]
    return gradients


@pytest.mark.usefixtures("_cudnn_installed")
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_cudnns_gradients_from_raw_projections(lower_bound: float | None) -> None:
    inputs = small(lower_bound=lower_bound)
    o, gradients = baseline.cudnn_from_raw(inputs)()
    assert o.shape == inputs["v"].shape
    for name, out, expected in zip(NAMES, gradients, our_gradients(inputs), strict=True):
        assert out.shape == inputs[name].shape
        assert relative_error(out, expected) <= 0.02, name


@pytest.mark.usefixtures("_cudnn_installed")
@pytest.mark.parametrize("forward", [True, False])
def test_cudnns_row_differentiates_what_it_takes(forward: bool) -> None:
    inputs = small()
    call = baseline.cudnn_core(forward)(inputs)
    again = call()[1]
    dq, dk, dv, dg, dbeta = call()[1]
    assert all(map(torch.equal, again, (dq, dk, dv, dg, dbeta)))
    assert dq.shape == dk.shape == dv.shape == dg.shape == (70, 2, 128)
    assert dg.dtype == dbeta.dtype == torch.float32
    assert dbeta.shape == (70, 2)
    expected = our_gradients(inputs)[2].squeeze(0)
    assert relative_error(dv, expected) <= 0.02


def test_cudnns_row_leaves_a_line_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn.linear_attention", None)
    with pytest.raises(UnavailableError, match=r"cuDNN frontend cannot run here: .*Error: "):
        baseline.cudnn_core(True)(small())
    (row,) = (
        row
        for row in bench_training.core_rows()
        if (row.stage, row.case, row.provider) == ("core training", "softplus-T8192-H8", OURS)
    )

    def refuse(row: Any) -> None:
        raise UnavailableError("no CUDA headers")

    with pytest.raises(pytest.skip.Exception, match=r"softplus-T8192-H8.*: no CUDA headers"):
        bench_training.bench_training(row, refuse, SimpleNamespace(extra_info={}))


@pytest.mark.usefixtures("_cudnn_installed")
def test_cudnns_rows_are_those_of_one_sequence() -> None:
    with mock.patch.object(bench_training, "fla", lambda side: {"FLA 0.6.0": side}):
        found = [(row.case, row.provider) for row in bench_training.core_rows()]
    for case, (lengths, _, _) in bench_training.CORES.items():
        providers = [provider for name, provider in found if name == case]
        theirs = ["FLA 0.6.0", CUDNN] if len(lengths) == 1 else ["FLA 0.6.0"]
        assert providers == [*theirs, OURS] * 2


def test_nothing_where_cudnn_is_not_installed() -> None:
    with mock.patch.object(baseline, "version", return_value=None):
        assert baseline.cudnn(baseline.cudnn_core) == {}


# ---------------------------------------------------------------------- our rows


SIZES = {"whole": ((70,), 2, None), "ragged": ((70, 0, 58), 2, -5.0)}


@pytest.fixture
def our_rows() -> Iterator[list[Row]]:
    """Those of operators, at small sizes."""
    sizes = {"CORES": SIZES, "TOKENS": 70, "CHANNELS": 48, "HEADS": 2, "HEAD_DIM": 16}
    with mock.patch.multiple(bench_training, **sizes):
        found = [*bench_training.core_rows(), *bench_training.small_rows()]
        yield [row for row in found if row.provider == OURS]


def test_our_rows_give_the_gradients_of_the_references(our_rows: list[Row]) -> None:
    assert len(our_rows) == 2 * len(SIZES) + 2
    for row in our_rows:
        with torch.no_grad():
            assert check(row, CPU) <= AGREEMENT, row


def test_a_row_with_a_wrong_gradient_is_not_measured(our_rows: list[Row]) -> None:
    for row in our_rows:

        def wrong(inputs: Inputs, prepare: Any = row.prepare) -> Any:
            *others, last = tensors(prepare(inputs)())
            return lambda: [*others, last * 1.1]

        with torch.no_grad(), pytest.raises(ValueError, match="is off by"):
            check(dataclasses.replace(row, prepare=wrong), CPU)


# ---------------------------------------------------------------------- errors of gradients


@pytest.fixture
def _tiny() -> Iterator[None]:
    with mock.patch.multiple(bench_training_accuracy, T=70, H=2, SAMPLES=2):
        bench_training_accuracy.samples.cache_clear()
        yield
    bench_training_accuracy.samples.cache_clear()


def ours() -> dict[str, Prepare]:
    found = bench_training_accuracy.providers()
    return {name: prepare for name, prepare in found.items() if name.startswith(OURS)}


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("name", bench_training_accuracy.CASES)
def test_gradients_are_checked_against_the_definition(name: str) -> None:
    """Those of our references in fp64 are those of the loop over tokens, but for rounding."""
    inputs, exact = bench_training_accuracy.samples(name, CPU)[0]
    double = {key: x.double() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    assert len(ours()) == 2
    for prepare in ours().values():
        for out, expected in zip(prepare(double)()[1], exact, strict=True):
            assert relative_error(out, expected) <= 1e-10


@pytest.mark.usefixtures("_tiny")
def test_a_row_of_errors_of_gradients() -> None:
    baselines: dict[str, dict[str, Any]] = {}
    found = {}
    with mock.patch.object(accuracy, "gpu", return_value={"gpu": "NVIDIA H200"}):
        for provider, prepare in {"FLA 0.6.0": ours()[OURS], **ours()}.items():
            errors, _ = bench_training_accuracy.measured("softplus", prepare, CPU)
            found[provider] = accuracy.accuracy_row(
                "gradient_accuracy", "softplus", provider, errors, baselines
            )
    names = {f"error_d{name}" for name in NAMES}
    for provider, row in found.items():
        assert row["gradient_accuracy"] == "softplus"
        assert {key for key in row if key.startswith("error_")} == names
        assert all(0 < row[key] < 0.02 for key in names), provider
        assert ("baseline_error_dq" in row) == provider.startswith(OURS)
    assert found[OURS]["baseline_error_dq"] == found["FLA 0.6.0"]["error_dq"]
    assert found[OURS]["baseline"] == "FLA 0.6.0"
