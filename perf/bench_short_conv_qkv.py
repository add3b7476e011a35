"""The prefill convolution of q, k and v with the norms of q and k, against FLA's kernels."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_short_conv_qkv
from perf.harness.rows import Row, operator_rows

ROWS = operator_rows("short_conv_qkv", baselines=fla(fla_short_conv_qkv))


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_short_conv_qkv(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
