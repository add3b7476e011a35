"""The gate against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_gate
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row", operator_rows("gate", baselines=fla(fla_gate), compile_too=True), ids=str
)
def bench_gate(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
