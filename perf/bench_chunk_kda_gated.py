"""The chunk operator from the raw gate and beta; its baselines are in the rows of `bench_core`."""

from collections.abc import Callable

import pytest

from perf.bench_chunk_kda import with_chunk_table
from perf.harness.rows import Row, operator_rows

ROWS = [with_chunk_table(row) for row in operator_rows("chunk_kda_gated")]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_chunk_kda_gated(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
