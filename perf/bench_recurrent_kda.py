"""Decode on paged states against FLA's step kernel."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_recurrent_kda
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row", operator_rows("recurrent_kda", baselines=fla(fla_recurrent_kda)), ids=str
)
def bench_recurrent_kda(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
