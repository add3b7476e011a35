"""The chunk operator against FLA's chunk kernels, and the whole prefill core from raw inputs
against FLA's whole core.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import chunk_kda, chunk_kda_gated, gate_cumsum, l2norm
from kda_ops._cases import Case
from kda_ops.chunks import chunk_table
from kda_ops.formulas import CHUNK
from perf.peers import fla, fla_chunk_kda, fla_core
from perf.rows import OURS, Row, direct, function_rows, operator_rows


def core_inputs(
    device: torch.device, T: int, H: int, D: int, lower_bound: float | None
) -> dict[str, Any]:
    """Raw projections of a layer, `[1, T, H, D]`, with rates and biases as FLA initialises them."""
    q, k, v, x = (torch.randn(1, T, H, D, device=device, dtype=torch.bfloat16) for _ in range(4))
    step = torch.empty(H, D, device=device).uniform_(-6.9, -2.3).exp()
    return {
        "q": q,
        "k": k,
        "v": v,
        "x": x,
        "beta": torch.randn(1, T, H, device=device, dtype=torch.bfloat16),
        "A_log": torch.empty(H, device=device).uniform_(1, 16).log(),
        "dt_bias": step.expm1().log(),
        "lower_bound": lower_bound,
    }


def core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
) -> tuple[Tensor, Tensor | None]:
    G = gate_cumsum(x, A_log, dt_bias, lower_bound=lower_bound)
    return chunk_kda(l2norm(q), l2norm(k), v, G, beta.sigmoid(), output_final_state=True)


def fused_core(**inputs: Any) -> tuple[Tensor, Tensor | None]:
    return chunk_kda_gated(**inputs, qk_norm_eps=1e-6, output_final_state=True)


def core_flops(T: int, H: int, K: int, V: int, C: int = CHUNK) -> int:
    """Matrix products of the chunked form: the two C x C score tiles, u and w, and the scan's four
    products.
    """
    per_chunk = 2 * (2 * C * C * K + C * C * (K + V) + 3 * C * K * V + C * C * V)
    return -(-T // C) * H * per_chunk


def core_case(name: str, T: int, H: int, lower_bound: float | None, D: int = 128) -> Case:
    return Case(
        name=name,
        make=lambda device: core_inputs(device, T, H, D, lower_bound),
        bytes_moved=2 * T * H * (5 * D + 1)
        + 4 * H * D * D,  # q, k, v, gate, o, beta; the final state
        flops=core_flops(T, H, D, D),
        perf=True,
    )


CORES = [
    core_case("softplus-T8192-H32", 8192, 32, None),
    core_case("bounded-T8192-H32", 8192, 32, -5.0),
    core_case("softplus-T1024-H32", 1024, 32, None),
]


def with_chunk_table(row: Row) -> Row:
    """The row with the chunk table made beforehand: a batch has one, shared by all its layers."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = row.make(device)
        if "cu_seqlens" in inputs and "chunks" not in inputs:
            inputs["chunks"] = chunk_table(inputs["cu_seqlens"], inputs["q"].shape[1])
        return inputs

    return dataclasses.replace(row, make=make)


def with_fused(rows: list[Row]) -> list[Row]:
    """The rows, and our own in one operator."""
    (own,) = (row for row in rows if row.who == OURS)
    return [*rows, dataclasses.replace(own, who=f"{OURS}, fused", prepare=direct(fused_core))]


ROWS = [with_chunk_table(row) for row in operator_rows("chunk_kda", peers=fla(fla_chunk_kda))] + [
    row
    for case in CORES
    for row in with_fused(function_rows("core", case, core, peers=fla(fla_core), compile_too=True))
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_chunk_kda(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
