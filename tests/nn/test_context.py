"""Sequences whose tokens are spread over 2 and 4 ranks: the recurrence, the convolution, the layer.

`tests/support/context_ranks.py` has the scenarios; all of them run in the same processes, once.
"""

import pytest

from tests.support.context_ranks import SCENARIOS
from tests.support.processes import failures_of


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Failures by scenario and rank."""
    store = tmp_path_factory.mktemp("context") / "store"
    return failures_of("tests.support.context_ranks", request.param, store)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
