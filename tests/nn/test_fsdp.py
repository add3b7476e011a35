"""The layer under FSDP2, in one process and in two: `A_log` and `dt_bias` stay in fp32.

`tests/support/fsdp_ranks.py` has the scenarios; all of them run in the same processes, once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kda_ops
from tests.support.fsdp_ranks import SCENARIOS

ROOT = Path(kda_ops.__file__).parent.parent


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Failures by scenario and rank."""
    world = request.param
    store = tmp_path_factory.mktemp("fsdp") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.fsdp_ranks", str(rank), str(world), str(store)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    found = {}
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, f"rank {rank} failed"
            for name, why in json.loads(output.splitlines()[-1]).items():
                found[name] = f"{found.get(name, '')}rank {rank}: {why}"
    finally:
        for process in ranks:
            process.kill()
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
