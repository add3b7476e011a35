"""A whole decode step between the projections, against FLA's kernels."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_kda_decode
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize("row", operator_rows("kda_decode", baselines=fla(fla_kda_decode)), ids=str)
def bench_kda_decode(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
