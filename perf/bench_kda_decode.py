"""The whole decode step between the projections against FLA's five kernels."""

from collections.abc import Callable

import pytest

from perf.peers import fla, fla_kda_decode
from perf.rows import OURS, Row, operator_rows

# FLA's convolution update takes one token per sequence
ROWS = [
    row
    for row in operator_rows("kda_decode", peers=fla(fla_kda_decode))
    if row.who == OURS or "spec" not in row.case
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_kda_decode(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
