"""Each operator against FLA's kernel for the same; the whole core is in `bench_core`.

Nothing else has `conv_split` (eager it copies, compiled it is to cost nothing of its own) and
`state_copy`, whose measure is the copy ceiling. The baselines of `chunk_kda_gated` are the rows of
`bench_core`, that of its affine form is `chunk_kda_gated` itself.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import chunk_cumsum, gate
from kda_ops._numerics import RCP_LN2
from kda_ops.varlen import prepare_chunk_indices
from perf.baselines import fla
from perf.harness.rows import COMPILED, Prepare, Row, function_rows, operator_rows

BASELINES: dict[str, Callable[..., Prepare] | None] = {
    "gate": fla.fla_gate,
    "chunk_cumsum": fla.fla_chunk_cumsum,
    "gate_cumsum": fla.fla_gate_cumsum,
    "l2norm": fla.fla_l2norm,
    "short_conv": fla.fla_short_conv,
    "short_conv_qkv": fla.fla_short_conv_qkv,
    "short_conv_update": fla.fla_short_conv_update,
    "conv_split": None,
    "chunk_kda": fla.fla_chunk_kda,
    "chunk_kda_gated": None,
    "chunk_kda_gated_affine": None,
    "recurrent_kda": fla.fla_recurrent_kda,
    "kda_decode": fla.fla_kda_decode,
    "rms_norm_gated": fla.fla_rms_norm_gated,
    "state_copy": None,
}
COMPILE_TOO = ("gate", "chunk_cumsum", "l2norm", "conv_split", "rms_norm_gated")


def with_chunk_table(row: Row) -> Row:
    """The row with the chunk table made beforehand: a batch has one, shared by all its layers."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = row.make(device)
        if "cu_seqlens" in inputs and "chunk_indices" not in inputs:
            inputs["chunk_indices"] = prepare_chunk_indices(
                inputs["cu_seqlens"], inputs["q"].shape[1]
            )
        return inputs

    return dataclasses.replace(row, make=make)


def small_operators(
    raw_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None = None, **options: Any
) -> Tensor:
    g = gate(raw_gate, A_log, dt_bias, lower_bound=options.pop("lower_bound", None))
    return chunk_cumsum(g, **options) * RCP_LN2


def small_operator_rows() -> list[Row]:
    """One row per case of `gate_cumsum`: gate, chunk_cumsum and a scale, compiled together."""
    return [
        dataclasses.replace(
            function_rows("gate_cumsum", case, small_operators, baselines={}, compile_too=True)[-1],
            provider=f"{COMPILED} from gate, chunk_cumsum, scale",
        )
        for case in importlib.import_module("kda_ops.gating.gate_cumsum.cases").CASES
        if case.perf
    ]


def all_rows() -> list[Row]:
    rows: list[Row] = []
    for name, baseline in BASELINES.items():
        beside = {} if baseline is None else fla.fla(baseline)
        found = operator_rows(name, baselines=beside, compile_too=name in COMPILE_TOO)
        rows += map(with_chunk_table, found) if name.startswith("chunk_kda") else found
        rows += small_operator_rows() if name == "gate_cumsum" else []
    return rows


@pytest.mark.parametrize("row", all_rows(), ids=str)
def bench_operator(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
