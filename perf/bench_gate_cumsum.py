"""Gate and cumsum against FLA's fused kernel, also as three small operators for the compiler to
fuse.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from kda_ops import chunk_cumsum, gate
from kda_ops._numerics import RCP_LN2
from perf.baselines.fla import fla, fla_gate_cumsum
from perf.harness.rows import COMPILED, Row, function_rows, operator_rows


def small_operators(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None = None, **options: Any
) -> Tensor:
    g = gate(x, A_log, dt_bias, lower_bound=options.pop("lower_bound", None))
    return chunk_cumsum(g, **options) * RCP_LN2


def small_operator_rows() -> list[Row]:
    """One row per case: gate, chunk_cumsum and a scale, compiled together."""
    return [
        dataclasses.replace(
            function_rows("gate_cumsum", case, small_operators, baselines={}, compile_too=True)[-1],
            provider=f"{COMPILED} from gate, chunk_cumsum, scale",
        )
        for case in importlib.import_module("kda_ops.gating.gate_cumsum.cases").CASES
        if case.perf
    ]


ROWS = operator_rows("gate_cumsum", baselines=fla(fla_gate_cumsum)) + small_operator_rows()


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_gate_cumsum(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
