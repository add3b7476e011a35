"""The norm of q and k against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_l2norm
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row", operator_rows("l2norm", baselines=fla(fla_l2norm), compile_too=True), ids=str
)
def bench_l2norm(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
