"""The script of the runs on several GPUs, on two processes of a CPU."""

import json
import subprocess
import sys
from pathlib import Path

from perf.several_gpus import HEAD, Result, line
from tests.support.processes import ROOT


def test_on_two_processes(tmp_path: Path) -> None:
    """Small and eager: what it prints and what it writes."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "perf.several_gpus", "--device=cpu", "--eager", f"--json={file}"]
    command += ["--hidden=16", "--heads=2", "--head-dim=8", "--repeats=1"]
    command += ["--long=130", "--short=70", "--longest=260"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    content = json.loads(file.read_text())
    rows = [Result(**row) for row in content["rows"]]
    assert content["ranks"] == 2
    assert [(row.name, row.tokens) for row in rows] == [
        ("one GPU", 130), ("one GPU", 70), ("cp 2", 130), ("tp 2", 70), ("cp 2", 260),
    ]  # fmt: skip
    assert "\n".join([HEAD, *map(line, rows)]) in found.stdout
    for one, several in ((rows[0], rows[2]), (rows[1], rows[3])):
        assert several.of_ideal is not None
        assert abs(several.of_ideal - one.seconds / several.seconds / 2) < 1e-9
