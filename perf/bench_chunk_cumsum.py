"""The chunk cumsum against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_chunk_cumsum
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row", operator_rows("chunk_cumsum", baselines=fla(fla_chunk_cumsum), compile_too=True), ids=str
)
def bench_chunk_cumsum(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
