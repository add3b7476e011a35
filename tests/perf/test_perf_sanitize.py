"""The sanitizer's command, with scripts instead of the tool."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from kda_ops._cases import operator_packages
from kda_ops.delta_rule.chunked.kernels import scan
from kda_ops.gating.gate.cases import CASES
from perf.analysis import sanitize
from tests.support.operators import RunKernels, cases

CPU = torch.device("cpu")
CLEAN = "========= ERROR SUMMARY: 0 errors"
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"


def tool(tmp_path: Path, says: str, status: int) -> str:
    script = tmp_path / "sanitizer"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\necho "{says}"\nexit {status}\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("says", "status", "found", "exits"),
    [
        (CLEAN, 0, "0 errors", 0),
        (RACES, 99, "2 hazards displayed (1 error, 1 warning)", 1),
        ("killed", 137, "no summary, exit status 137", 1),
        ("no device", 0, "no summary, exit status 0", 1),
    ],
)
def test_findings_of_a_tool(
    says: str,
    status: int,
    found: str,
    exits: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--sanitizer", tool(tmp_path, says, status), "--logs", str(tmp_path / "logs")]
    cases = ["--operators", "gate", "--tools", "racecheck"]

    with mock.patch.object(sanitize, "call", alone_is_fine(sanitize.call)):
        assert sanitize.main([*arguments, *cases]) == exits
    assert f"| {found} |" in capsys.readouterr().out
    assert "--tool racecheck" in (tmp_path / "arguments").read_text()


def alone_is_fine(call):
    """There is no device for the run without a tool."""

    def run(command, log: Path, seconds: float) -> int:
        if log.name != "alone.log":
            return call(command, log, seconds)
        log.write_text("3 calls\n")
        return 0

    return run


def test_cases_that_fail_alone_are_not_blamed_on_a_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sanitizer", tool(tmp_path, CLEAN, 0), "--logs", str(tmp_path / "logs")]
    with mock.patch.object(sanitize, "call", return_value=7):
        assert sanitize.main(arguments) == 1
    assert "do not run alone, exit status 7" in capsys.readouterr().err


def test_a_missing_sanitizer_is_named() -> None:
    with (
        mock.patch.object(sanitize.shutil, "which", return_value=None),
        mock.patch.object(sanitize, "PLACES", ()),
        pytest.raises(FileNotFoundError, match="compute-sanitizer is not on the PATH"),
    ):
        sanitize.find_sanitizer()


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda_gated"])
def test_chunked_kda_also_runs_in_segments(name: str) -> None:
    module = f"{operator_packages()[name]}.cases"
    case = next(case for case in cases(name) if sanitize.takes_segments(name, case.make(CPU)))
    launched = mock.patch.object(scan, "launch_segments", wraps=scan.launch_segments)
    with mock.patch(f"{module}.CASES", [case]), launched as launch, RunKernels():
        assert sanitize.run_cases([name], CPU) == 2
    assert launch.call_count == 1


def test_small_cases_run() -> None:
    small = [case for case in CASES if not case.perf and not case.cpu_only]
    assert sanitize.run_cases(["gate"], torch.device("cpu")) == len(small) > 0
