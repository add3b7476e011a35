"""The prefill convolution of q, k and v against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_short_conv
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize("row", operator_rows("short_conv", baselines=fla(fla_short_conv)), ids=str)
def bench_short_conv(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
