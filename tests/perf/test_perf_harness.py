"""How rows are measured, without a GPU: what consecutive rows share, and baselines' autotuning."""

import functools
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner

import kda_ops
from kda_ops import fused
from kda_ops.delta_rule.chunk_kda_gated import cases as chunk_cases
from kda_ops.gating.gate.cases import CASES
from perf import bench_core_accuracy
from perf.baselines import autotuning
from perf.bench_core import RAGGED, core, core_case, core_rows, fused_core
from perf.harness import rows, timing
from perf.harness.machine import Ceilings
from perf.harness.rows import OURS, Row

CPU = torch.device("cpu")


def gate_row(**changes: Any) -> Row:
    fields: dict[str, Any] = {
        "stage": "gate",
        "case": "small",
        "provider": OURS,
        "make": CASES[0].make,
        "prepare": rows.direct(kda_ops.gate),
        "expected": rows.through_references(kda_ops.gate),
    }
    return Row(**(fields | changes))


def measure(measurer: rows.Measurer, row: Row) -> dict[str, Any]:
    """What is recorded for a row, with the GPU parts of measuring replaced."""
    benchmark = SimpleNamespace(extra_info={}, group=None)
    with (
        mock.patch.object(rows, "_measured_seconds", return_value=1e-6),
        mock.patch.object(rows, "ceilings", return_value=Ceilings(4e12, 8e14)),
        mock.patch.object(timing, "kernels", return_value={"a": (2, 1.5), "b": (1, 2.0)}),
        mock.patch.object(timing, "workspace_bytes", return_value=1_250_000),
        mock.patch.object(timing, "eager_seconds", return_value=1e-5),
    ):
        measurer(row, benchmark)
    return benchmark.extra_info


def test_the_gpu_waits_until_calls_are_queued() -> None:
    """Where a row says so, and no longer than needed where the host is quick."""
    with mock.patch.object(torch.cuda, "synchronize"):
        assert timing.queueing_cycles(lambda: time.sleep(0.02)) >= 0.03 * timing.CYCLES_PER_SECOND
        assert timing.queueing_cycles(lambda: None) == timing.SPIN_CYCLES
    spins = []

    def pedantic(measured: Any, rounds: int) -> None:
        measured()

    stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))
    benchmark = SimpleNamespace(pedantic=pedantic, stats=stats)
    with (
        mock.patch.object(timing, "warm_up"),
        mock.patch.object(timing, "queueing_cycles", return_value=7),
        mock.patch.object(timing, "event_seconds", lambda _, cycles: spins.append(cycles) or 1.0),
    ):
        for ahead in (True, False):
            rows._measured_seconds([lambda: None], benchmark, False, ahead)
    assert spins == [7, timing.SPIN_CYCLES]


def test_calls_of_two_take_turns() -> None:
    """A host that becomes slower is so for both."""
    order: list[str] = []
    calls = [functools.partial(order.append, name) for name in ("first", "second")]

    def seconds(timed: list[Any], rounds: int) -> float:
        assert rounds == 1
        timed[0]()
        slower = 10.0 if len(order) > 4 else 1.0
        return slower * {"first": 2.0, "second": 3.0}[order[-1]]

    with (
        mock.patch.object(timing, "warm_up"),
        mock.patch.object(timing, "eager_seconds", seconds),
    ):
        assert timing.times_of_first(*calls, rounds=5) == 1.5
    assert order == ["first", "second"] * 5


def test_a_case_is_computed_once_for_its_rows() -> None:
    computed = []

    def expected(inputs: rows.Inputs) -> rows.Call:
        computed.append(inputs)
        return rows.through_references(kda_ops.gate)(inputs)

    measurer = rows.Measurer(CPU, 1 << 10, {})
    for provider in ("baseline", OURS, rows.COMPILED):
        measure(measurer, gate_row(provider=provider, expected=expected))
    assert len(computed) == 1
    measure(measurer, gate_row(case="another", make=CASES[1].make, expected=expected))
    assert len(computed) == 2


def test_large_results_are_not_kept() -> None:
    measurer = rows.Measurer(CPU, 1 << 10, {})
    with mock.patch.object(rows, "REMEMBERED_BYTES", 0):
        measure(measurer, gate_row())
    assert measurer.remembered is None


def test_a_wrong_row_is_detected_with_cached_expected_results() -> None:
    measurer = rows.Measurer(CPU, 1 << 10, {})
    expected = rows.through_references(kda_ops.gate)
    measure(measurer, gate_row(expected=expected))
    wrong = rows.direct(lambda **inputs: kda_ops.gate(**inputs) * 1.1)
    with pytest.raises(ValueError, match="is off by"):
        measure(measurer, gate_row(expected=expected, prepare=wrong))


def test_a_row_records_its_host_seconds() -> None:
    written = measure(rows.Measurer(CPU, 1 << 10, {}), gate_row())
    steps = ["reference", "check", "inputs", "measure", "profile", "eager"]
    assert list(written["host_seconds"]) == steps
    assert all(seconds >= 0 for seconds in written["host_seconds"].values())
    assert written["kernel_us"] == 3.5
    assert written["workspace_MB"] == 1.2


class FakeKernel:
    """A fake Triton kernel: records how it was run, and in which compile mode."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, bool, bool]] = []
        self.fn = lambda x, BLOCK: None
        self.__name__ = "fake"

    def run(self, x: int, *, BLOCK: int, grid: Any, warmup: bool, **options: Any) -> None:
        from triton.runtime._async_compile import active_mode

        self.runs.append((BLOCK, warmup, active_mode.get() is not None))


def test_configurations_compile_together_before_they_are_timed() -> None:
    kernel = FakeKernel()
    configs = [triton.Config({"BLOCK": block}) for block in (16, 32, 64)]
    tuner = Autotuner(kernel, ["x", "BLOCK"], configs, ["x"], None, None)

    def bench(call: Any, quantiles: Any) -> list[float]:
        call()
        return [1.0 if kernel.runs[-1][0] == 32 else 2.0] * 3

    with autotuning.quick_tuning(threads=2), mock.patch.object(autotuning, "timed_briefly", bench):
        tuner[(1,)](7)
        tuner[(1,)](7)
    compiled = [(16, True, True), (32, True, True), (64, True, True)]
    timed = [(16, False, False), (32, False, False), (64, False, False)]
    assert kernel.runs == [*compiled, *timed, (32, False, False), (32, False, False)]


def test_autotuning_is_restored_afterwards() -> None:
    before = Autotuner.prune_configs
    with autotuning.quick_tuning():
        assert Autotuner.prune_configs is not before
    assert Autotuner.prune_configs is before


def test_core_cases_have_the_tokens_in_their_names() -> None:
    assert sum(RAGGED) == 8192
    case = core_case("small", (70, 58), 2, None)
    inputs = case.make(CPU)
    assert inputs["q"].shape == (1, 128, 2, 128)
    assert inputs["cu_seqlens"].tolist() == [0, 70, 128]
    again = case.make(CPU)
    assert again["cu_seqlens"] is inputs["cu_seqlens"]
    assert again["q"] is not inputs["q"]
    chunks = 2 + 1
    assert case.flops == chunks * 2 * 2 * (4 * 64 * 64 * 128 + 3 * 64 * 128 * 128 + 64 * 64 * 128)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("lengths", [(130,), (70, 0, 58)], ids=["whole", "ragged"])
def test_both_of_our_cores_compute_the_core(
    lengths: tuple[int, ...], lower_bound: float | None
) -> None:
    found = [
        row
        for row in core_rows(core_case("small", lengths, 2, lower_bound))
        if row.provider.startswith(OURS)
    ]
    assert len(found) == 2
    for row in found:
        assert rows.check(row, CPU) <= rows.AGREEMENT


@pytest.mark.parametrize("name", bench_core_accuracy.CASES)
def test_accuracy_is_checked_against_the_definition(name: str) -> None:
    """Our references in fp64 agree with the loop over tokens to rounding, on each case's inputs."""
    with mock.patch.multiple(bench_core_accuracy, T=70, H=2):
        inputs = bench_core_accuracy.make(name, 0, CPU)
    exact = bench_core_accuracy.step_recurrence(**inputs)
    double = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    for function in (core, fused_core):
        for out, expected in zip(function(**double), exact, strict=True):
            assert rows.relative_error(out, expected) <= 1e-10


@pytest.mark.parametrize("pages", [1, 5])
def test_rows_of_paged_states_can_be_checked(pages: int) -> None:
    """Also the pages that nobody reads."""
    case = chunk_cases._perf("pages", T=256, H=1, norm=True, pages=pages)
    (row,) = rows.function_rows(
        "chunk_kda_gated", case, fused.chunk_kda_gated, baselines={}, compile_too=False
    )
    assert rows.check(row, CPU) < rows.AGREEMENT
