"""Splitting a convolution state: eager it copies, compiled it is to cost nothing of its own."""

from collections.abc import Callable

import pytest

from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize("row", operator_rows("conv_split", compile_too=True), ids=str)
def bench_conv_split(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
