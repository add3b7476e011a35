"""The layer under FSDP2, in one process and in two: `A_log` and `dt_bias` stay in fp32.

`tests/support/fsdp_ranks.py` has the scenarios; all of them run in the same processes, once.
"""

import pytest

from tests.support.fsdp_ranks import SCENARIOS
from tests.support.processes import failures_of


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Failures by scenario and rank."""
    store = tmp_path_factory.mktemp("fsdp") / "store"
    return failures_of("tests.support.fsdp_ranks", request.param, store)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
