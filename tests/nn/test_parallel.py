"""The layer by heads over 2 and 4 ranks, operators on DTensors, and FSDP2 on top of both.

`tests/support/parallel_ranks.py` and `dtensor_ranks.py` have the scenarios; all of them run in the
same processes, once.
"""

import itertools
import json
from pathlib import Path

import pytest

from kda_ops._registry import OPERATORS
from kda_ops._sharding import RULES
from tests.support import dtensor_ranks, lost_ranks, parallel_ranks
from tests.support.processes import failures_of, free_ports, start

SCENARIOS = parallel_ranks.SCENARIOS | dtensor_ranks.SCENARIOS


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Failures by scenario and rank."""
    store = tmp_path_factory.mktemp("parallel") / "store"
    return failures_of("tests.support.parallel_ranks", request.param, store)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


def test_a_lost_rank_is_an_error(tmp_path: Path) -> None:
    """Wherever a rank dies, or takes another mesh, the others get an error, and none waits on."""
    ranks = {
        when: start("tests.support.lost_ranks", 2, tmp_path / f"store{i}", when)
        for i, when in enumerate(lost_ranks.WHEN)
    }
    try:
        for when, (first, second) in ranks.items():
            for process in (first,) if when != "another mesh" else (first, second):
                # starting takes its time; waiting for the other no more than the timeout
                output, _ = process.communicate(timeout=60 + 2 * lost_ranks.TIMEOUT_S)
                error = json.loads(output.splitlines()[-1])
                assert error is not None, when
                assert "Error" in error.partition(":")[0], (when, error)
    finally:
        for process in itertools.chain(*ranks.values()):
            process.kill()
            process.communicate()


def test_the_page_runs_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGE_PORT", *free_ports(1))
    ranks = start("tests.support.page_ranks", 2, tmp_path / "store")
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank} failed"
            assert int(output.splitlines()[-1]) >= 4
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_every_operator_has_a_rule() -> None:
    schemas = [operator.schema for operator in OPERATORS.values()]
    names = {schema[: schema.index("(")] for schema in schemas}
    assert {name for name in names if not name.startswith("test_")} == RULES.keys()
