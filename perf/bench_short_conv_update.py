"""The decode convolution against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_short_conv_update
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row", operator_rows("short_conv_update", baselines=fla(fla_short_conv_update)), ids=str
)
def bench_short_conv_update(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
