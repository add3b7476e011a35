"""How pairs are measured on a CPU and told, without measuring any."""

import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from perf import bench_cpu
from perf.analysis import report
from perf.bench_cpu import BLOCK, WARM_UP, measure_pair


class FakeBenchmark:
    """Stands for pytest-benchmark: makes the calls."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""

    def pedantic(self, call: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()


def measured(seconds: float, other: float, target: float, **options: Any) -> dict[str, Any]:
    """What is written down of a call of `seconds` beside one of `other` seconds."""
    benchmark, now, order = FakeBenchmark(), [0.0], []

    def passes(name: str, duration: float) -> None:
        order.append(name)
        now[0] += duration

    with (
        mock.patch.object(bench_cpu.time, "perf_counter", side_effect=lambda: now[0]),
        mock.patch.object(bench_cpu.machine, "cpu", return_value="a processor"),
    ):
        own, others = (functools.partial(passes, *x) for x in (("call", seconds), ("other", other)))
        calls = (own, "a copy", others)
        measure_pair(benchmark, "work", "small", *calls, target, rounds=2 * BLOCK, **options)
    turns = ["other"] * BLOCK + ["call"] * BLOCK
    assert order == ["other", "call"] * WARM_UP + turns * 2
    return benchmark.extra_info


def test_a_ratio_is_how_many_times_as_fast_or_as_long() -> None:
    faster = measured(1e-3, 4e-3, 3.0)
    assert (faster["ratio"], faster["met"], faster["us"], faster["against_us"]) == (
        4,
        True,
        1e3,
        4e3,
    )
    assert not measured(2e-3, 4e-3, 3.0)["met"]
    longer = measured(2e-3, 1e-3, 3.0, at_most=True)
    assert (longer["ratio"], longer["met"]) == (2, True)
    assert not measured(4e-3, 1e-3, 3.0, at_most=True)["met"]


def test_the_table_of_pairs_needs_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.json"
    found = [measured(2e-3, 4e-3, 3.0), measured(2e-3, 1e-3, 3.0, at_most=True) | {"case": "large"}]
    run.write_text(json.dumps({"benchmarks": [{"extra_info": info} for info in found]}))
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a processor, 2 threads, torch ")
    assert "| work | small | 2,000 | a copy | 4,000 | 2.00 | at least 3 | **missed** |\n" in out
    assert "| work | large | 2,000 | a copy | 1,000 | 2.00 | at most 3 | met |\n" in out
