"""Splitting a convolution state: a copy in eager mode, ideally free when compiled."""

from collections.abc import Callable

import pytest

from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize("row", operator_rows("conv_split", compile_too=True), ids=str)
def bench_conv_split(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
