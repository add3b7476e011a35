"""The chunk operator from normalized q and k and the cumulative gate, against FLA's chunk kernels;
the whole core is in `bench_core`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kda_ops.varlen import prepare_chunk_indices
from perf.baselines.fla import fla, fla_chunk_kda
from perf.harness.rows import Row, operator_rows


def with_chunk_table(row: Row) -> Row:
    """The row with a precomputed chunk table, which all layers of a batch share."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = row.make(device)
        if "cu_seqlens" in inputs and "chunk_indices" not in inputs:
            inputs["chunk_indices"] = prepare_chunk_indices(
                inputs["cu_seqlens"], inputs["q"].shape[1]
            )
        return inputs

    return dataclasses.replace(row, make=make)


ROWS = [with_chunk_table(row) for row in operator_rows("chunk_kda", baselines=fla(fla_chunk_kda))]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_chunk_kda(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
