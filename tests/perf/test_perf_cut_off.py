"""A run that is cut off has its rows on disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kda_ops
from perf.analysis import report, targets
from perf.harness import machine
from perf.harness.runs import read_run

ROOT = Path(kda_ops.__file__).parent.parent
SECONDS = 120
# Children of a background job ignore SIGINT.
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""
# its first row is a row of ours, and its second one never ends
BENCHMARK = """
import pathlib, time
import pytest

pytestmark = pytest.mark.host


@pytest.mark.parametrize("provider", ["kda_ops", "never"])
def bench_slowly(provider, benchmark):
    if provider == "never":
        pathlib.Path("started").touch()
        time.sleep(600)
    benchmark.pedantic(lambda: None, rounds=2)
    benchmark.extra_info |= {"stage": "core", "case": "small", "provider": provider, "us": 1.5}
"""


def started(folder: Path) -> subprocess.Popen[bytes]:
    """A run of the benchmark that is in its second row."""
    (folder / "bench_slowly.py").write_text(BENCHMARK)
    command = [sys.executable, "-c", PYTEST, "-q", "-p", "perf.conftest", "bench_slowly.py"]
    command += [
        f"--config-file={ROOT / 'pyproject.toml'}",
        "--rootdir=.",
        "--benchmark-json=run.json",
    ]
    # a worker of pytest-xdist would not benchmark
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + SECONDS
    while not (folder / "started").exists():
        if run.poll() is not None or time.monotonic() > end:
            run.kill()
            pytest.fail(f"the second row did not start:\n{run.communicate()[0].decode()}")
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_cut_off_keeps_its_rows(name: str, tmp_path: Path) -> None:
    """Ctrl-C, `timeout`, and what no process hears of."""
    with started(tmp_path) as run:
        run.send_signal(getattr(signal, name))
        try:
            out = run.communicate(timeout=SECONDS)[0].decode()
        finally:
            run.kill()
    assert run.returncode != 0, out
    assert [path.name for path in tmp_path.glob("run.json*")] == ["run.json"], out
    found = read_run(tmp_path / "run.json")
    assert {"machine_info", "commit_info", "datetime"} <= set(found)
    assert set(machine.software()) <= set(found["machine_info"])
    (row,) = report.newest([found])
    assert (row["provider"], row["us"]) == ("kda_ops", 1.5)
    assert targets.rows_of(found) == [row]
