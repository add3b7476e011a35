"""The gated output norm against FLA's."""

from collections.abc import Callable

import pytest

from perf.baselines.fla import fla, fla_rms_norm_gated
from perf.harness.rows import Row, operator_rows


@pytest.mark.parametrize(
    "row",
    operator_rows("rms_norm_gated", baselines=fla(fla_rms_norm_gated), compile_too=True),
    ids=str,
)
def bench_rms_norm_gated(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
