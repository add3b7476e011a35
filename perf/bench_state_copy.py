"""Copying states between blocks of one engine; no baseline has this operator, so it is compared
with the copy ceiling.
"""

from collections.abc import Callable

import pytest

from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize("row", operator_rows("state_copy"), ids=str)
def bench_state_copy(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
