"""The benchmark harness without a GPU: rooflines, ratios, checks, the report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import kda_ops
from kda_ops.gating.gate.cases import CASES
from perf.analysis import report, targets
from perf.harness import machine, rows, timing
from perf.harness.machine import Ceilings
from perf.harness.rows import OURS, Row
from perf.harness.runs import read_run

CEILINGS = Ceilings(bytes_per_second=4.0e12, flops_per_second=8.0e14)
FACTS = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2.11.0", "triton": "3.6.0", "fla": "0.6.0"}


def make_row(**changes: Any) -> Row:
    """The gate on its first case."""
    fields: dict[str, Any] = {
        "stage": "gate",
        "case": "small",
        "provider": OURS,
        "make": CASES[0].make,
        "prepare": rows.direct(kda_ops.gate),
        "expected": rows.through_references(kda_ops.gate),
        "bytes_moved": 8_000_000,
        "flops": 0,
    }
    return Row(**(fields | changes))


def make_result(provider: str, us: float, **changes: Any) -> report.Result:
    """A result as a run holds it."""
    baselines = {"FLA 0.6.0": 5e-6} if provider.startswith(OURS) else {}
    described = rows.describe(make_row(provider=provider), us * 1e-6, CEILINGS, baselines)
    return described | {"launches": 1} | FACTS | changes


def test_the_roofline_is_the_slower_of_bytes_and_flops() -> None:
    assert CEILINGS.roofline_seconds(4_000_000, 0) == 1e-6
    assert CEILINGS.roofline_seconds(4_000_000, 8_000_000_000) == 1e-5


def test_rates_and_ratio_of_a_row() -> None:
    baselines = {"slow": 9e-6, "fast": 5e-6}
    facts = rows.describe(make_row(flops=4_000_000), 4e-6, CEILINGS, baselines)
    assert facts["us"] == 4.0
    assert facts["roofline_us"] == 2.0
    assert facts["percent_of_roofline"] == 50.0
    assert facts["GB_per_s"] == 2000.0
    assert facts["TFLOP_per_s"] == 1.0
    assert (facts["baseline"], facts["baseline_us"], facts["baseline_ratio"]) == ("fast", 5.0, 1.25)


def test_a_baseline_has_no_ratio_to_itself() -> None:
    facts = rows.describe(make_row(provider="FLA 0.6.0"), 4e-6, CEILINGS, {"FLA 0.6.0": 4e-6})
    assert "baseline_ratio" not in facts


@pytest.mark.parametrize(
    ("bytes_per_call", "sets"), [(1, 64), (2_000_000, 64), (10_000_000, 18), (10**9, 2)]
)
def test_inputs_rotate_through_three_times_the_cache(bytes_per_call: int, sets: int) -> None:
    assert timing.rotations(bytes_per_call, 60_000_000) == sets


def test_a_correct_row_passes_its_check() -> None:
    assert rows.check(make_row(), torch.device("cpu")) <= rows.AGREEMENT


def test_a_wrong_row_is_not_measured() -> None:
    wrong = rows.direct(lambda **inputs: kda_ops.gate(**inputs) * 1.1)
    with pytest.raises(ValueError, match=r"is off by 1\.00e-01"):
        rows.check(make_row(prepare=wrong), torch.device("cpu"))


def test_a_row_that_leaves_elements_unwritten_is_not_measured() -> None:
    def forgetful(**inputs: Any) -> torch.Tensor:
        g = kda_ops.gate(**inputs)
        out = torch.empty_like(g)
        out[:, 1:] = g[:, 1:]
        return out

    with pytest.raises(ValueError, match="is off by inf"):
        rows.check(make_row(prepare=rows.direct(forgetful)), torch.device("cpu"))


def test_a_row_of_another_shape_is_not_measured() -> None:
    wrong = rows.direct(lambda **inputs: kda_ops.gate(**inputs)[:1])
    with pytest.raises(ValueError, match=r"result 0 has shape \(1, 37, 3, 64\), expected"):
        rows.check(make_row(prepare=wrong), torch.device("cpu"))


def test_measuring_records_the_baseline_before_ours() -> None:
    """The measuring loop with its GPU parts replaced: replays take 2 us and 4 us a call."""
    written = {}
    measurer = rows.Measurer(torch.device("cpu"), 1 << 20, FACTS)
    for provider, seconds in (("FLA 0.6.0", 4e-6), (OURS, 2e-6)):
        benchmark = SimpleNamespace(extra_info={}, group=None)
        with (
            mock.patch.object(rows, "_measured_seconds", return_value=seconds),
            mock.patch.object(rows, "ceilings", return_value=CEILINGS),
            mock.patch.object(timing, "kernels", return_value={"k": (2, 1.5)}),
            mock.patch.object(timing, "eager_seconds", return_value=1e-5),
            mock.patch.object(timing, "workspace_bytes", return_value=0),
        ):
            measurer(make_row(provider=provider), benchmark)
        written[provider] = benchmark.extra_info
    assert written[OURS]["baseline_ratio"] == 2.0
    assert written[OURS]["launches"] == 2
    assert written[OURS]["kernels"] == {"k": [2, 1.5]}
    assert written[OURS]["eager_us"] == 10.0
    assert written[OURS]["gpu"] == "NVIDIA H200"
    assert "baseline_ratio" not in written["FLA 0.6.0"]
    json.dumps(written)


def fabricated_run(path: Path) -> Path:
    entries = [make_result("FLA 0.6.0", 5.0), make_result(OURS, 4.0)]
    benchmarks = [{"extra_info": entry} for entry in entries] + [{"extra_info": {}}]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


def test_the_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(fabricated_run(tmp_path / "run.json"))]) == 0
    assert capsys.readouterr().out == (
        "NVIDIA H200, driver 1, torch 2.11.0, triton 3.6.0, FLA 0.6.0; copy 4.00 TB/s, "
        "bf16 GEMM 800 TFLOP/s in the same run.\n\n"
        "| stage | case | provider | us | roofline, us | of roofline | GB/s | TFLOP/s | launches "
        "| baseline / ours |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| gate | small | FLA 0.6.0 | 5 | 2 | 40 % | 1,600 |  | 1 |  |\n"
        "| gate | small | kda_ops | 4 | 2 | 50 % | 2,000 |  | 1 | 1.25 |\n"
        f"\n{targets.table([])}\n\n"
    )


def test_rates_of_the_host_need_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.json"
    found = {"step": "plan", "case": "8-to-2", "what": "reads", "per_second": 1.25e6}
    run.write_text(json.dumps({"benchmarks": [{"extra_info": found}]}))
    assert report.main([str(run)]) == 0
    assert "| plan | 8-to-2 | reads | 1.25 |\n" in capsys.readouterr().out


def test_errors_of_large_results_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    out, expected = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    whole = float((out - expected).double().norm() / expected.double().norm())
    for at_once in (1, 9, 1000):
        monkeypatch.setattr(rows, "COMPARED_AT_ONCE", at_once)
        assert rows.relative_error(out, expected) == pytest.approx(whole)
        assert rows.relative_error(expected, expected) == 0.0
        out[1, 6, 4] = float("nan")
        assert rows.relative_error(out, expected) == float("inf")
        out[1, 6, 4] = 0.0
        whole = float((out - expected).double().norm() / expected.double().norm())


def test_a_row_slower_than_a_baseline_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": [{"extra_info": make_result(OURS, 8.0)}]}))
    assert report.main([str(run)]) == 0
    assert "slower than FLA 0.6.0 (0.62): gate small, kda_ops\n" in capsys.readouterr().out


def test_the_page_gets_the_table_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = [str(fabricated_run(tmp_path / "run.json")), "--page", str(page)]
    assert report.main(arguments) == 0
    first = page.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\nNVIDIA H200")
    assert first.endswith(f"| 1.25 |\n\n</details>\n{report.END}\nafter\n")
    assert targets.table([]) in first
    assert "old" not in first
    assert report.main(arguments) == 0
    assert page.read_text() == first


def test_each_row_is_from_the_newest_run_that_has_it(tmp_path: Path) -> None:
    old = {"datetime": "2026-01-01", "benchmarks": []}
    new = {"datetime": "2026-01-02", "benchmarks": []}
    for run, us, providers in ((old, 6.0, ("FLA 0.6.0", OURS)), (new, 4.0, (OURS,))):
        run["benchmarks"] = [{"extra_info": make_result(provider, us)} for provider in providers]
    for order in ((old, new), (new, old)):
        found = {row["provider"]: row["us"] for row in report.newest(order)}
        assert found == {"FLA 0.6.0": 6.0, OURS: 4.0}


def test_a_target_is_judged_within_one_run() -> None:
    runs = [
        {
            "datetime": f"2026-01-0{day}",
            "benchmarks": [{"extra_info": make_result(*x)} for x in rows],
        }
        for day, rows in (
            (1, [("FLA 0.6.0", 6.0), (OURS, 5.0), (f"{OURS}, fused", 1.0)]),
            (2, [("FLA 0.6.0", 8.0), (OURS, 4.0)]),
            (3, [("FLA 0.6.0", 9.0)]),
        )
    ]
    for order in (runs, runs[::-1]):
        found = {row["provider"]: row["us"] for row in report.measured_together(order)}
        assert found == {"FLA 0.6.0": 8.0, OURS: 4.0}
    (alone,) = report.measured_together(runs[2:])
    assert alone["us"] == 9.0


def test_the_slowest_rows_to_measure_are_listed() -> None:
    found = [make_result(OURS, 4.0, host_seconds={"check": x, "measure": 1.0}) for x in (2.0, 5.0)]
    assert [seconds for _, seconds in report.slowest([*found, make_result(OURS, 1.0)])] == [
        6.0,
        3.0,
    ]


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must hold <!-- perf:begin --> and then"):
        report.main([str(fabricated_run(tmp_path / "run.json")), "--page", str(page)])
    assert page.read_text() == "nothing here\n"


def test_a_run_without_rows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": []}))
    assert report.main([str(run)]) == 1
    assert "no rows in" in capsys.readouterr().err


def test_committed_runs_make_a_table() -> None:
    for path in machine.HISTORY.glob("*/*.json"):
        run = read_run(path)
        found, paired = report.results(run), report.pairs(run)
        assert found or paired, f"{path} holds no rows"
        if paired:
            assert len(report.pair_table(paired).splitlines()) == len(paired) + 4
        assert len(report.table(found).splitlines()) == len(found) + 2
