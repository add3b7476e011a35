"""The prefill core from raw projections, against the baselines' whole cores, at the sizes of the
targets: q, k, v, gate input and beta in, output and final states out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import chunk_kda, gate_cumsum, l2norm
from kda_ops._cases import Case
from kda_ops._numerics import CHUNK
from kda_ops.fused import chunk_kda_gated
from kda_ops.varlen import prepare_chunk_indices
from perf.baselines.fla import fla, fla_core
from perf.baselines.others import more_baselines
from perf.harness.rows import OURS, Row, direct, function_rows

D = 128
# raw inputs of the core that have gradients
NAMES = ("q", "k", "v", "raw_gate", "raw_beta", "A_log", "dt_bias")
RAGGED = (1300, 547, 2048, 963, 271, 3063)


@functools.cache
def offsets(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and chunk table of a batch, the same tensors for every set of inputs: FLA caches what
    it derives from offsets by identity, and would otherwise synchronize during graph capture.
    """
    sums = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(sums, dtype=torch.int32, device=device)
    return cu_seqlens, prepare_chunk_indices(cu_seqlens, sums[-1])


def core_inputs(
    device: torch.device, lengths: tuple[int, ...], H: int, lower_bound: float | None
) -> dict[str, Any]:
    """Raw projections of a layer, `[1, T, H, D]`, with rates and biases initialized like FLA's."""
    T = sum(lengths)
    q, k, v, x = (torch.randn(1, T, H, D, device=device, dtype=torch.bfloat16) for _ in range(4))
    step = torch.empty(H, D, device=device).uniform_(-6.9, -2.3).exp()
    A_log = torch.empty(H, device=device).uniform_(1, 16).log()
    inputs: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "raw_gate": x,
        "raw_beta": torch.randn(1, T, H, device=device, dtype=torch.bfloat16),
        "A_log": A_log if lower_bound is None else torch.zeros_like(A_log),
        "dt_bias": step.expm1().log(),
        "lower_bound": lower_bound,
    }
    if len(lengths) > 1:
        inputs["cu_seqlens"], inputs["chunk_indices"] = offsets(lengths, device)
    return inputs


def core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_gate: Tensor,
    raw_beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
    **batch: Tensor,
) -> tuple[Tensor, Tensor | None]:
    G = gate_cumsum(raw_gate, A_log, dt_bias, lower_bound=lower_bound, **batch)
    return chunk_kda(
        l2norm(q), l2norm(k), v, G, raw_beta.sigmoid(), output_final_state=True, **batch
    )


def fused_core(**inputs: Any) -> tuple[Tensor, Tensor | None]:
    return chunk_kda_gated(**inputs, qk_norm_eps=1e-6, output_final_state=True)


def core_flops(chunks: int, H: int) -> int:
    """FLOPs of the chunked form: two C x C score tiles, u and w, and the scan's four GEMMs."""
    return chunks * H * 2 * (2 * CHUNK**2 * D + 2 * CHUNK**2 * D + 3 * CHUNK * D**2 + CHUNK**2 * D)


def core_case(name: str, lengths: tuple[int, ...], H: int, lower_bound: float | None) -> Case:
    T = sum(lengths)
    return Case(
        name=name,
        make=lambda device: core_inputs(device, lengths, H, lower_bound),
        # q, k, v, gate, o, beta; the final states
        bytes_moved=2 * T * H * (5 * D + 1) + 4 * len(lengths) * H * D * D,
        flops=core_flops(sum(-(-length // CHUNK) for length in lengths), H),
        perf=True,
    )


CASES = [
    core_case("softplus-T8192-H32", (8192,), 32, None),
    core_case("bounded-T8192-H32", (8192,), 32, -5.0),
    core_case("softplus-T1024-H32", (1024,), 32, None),
    core_case("softplus-8x1024-H32", (1024,) * 8, 32, None),
    core_case("softplus-6ragged-T8192-H32", RAGGED, 32, None),
    core_case("softplus-T8192-H8", (8192,), 8, None),
    core_case("bounded-T8192-H64", (8192,), 64, -5.0),
    core_case("bounded-T8192-H96", (8192,), 96, -5.0),
]
COMPILED_TOO = ("softplus-T8192-H32", "softplus-T1024-H32")


def core_rows(case: Case) -> list[Row]:
    """The baselines, the small operators called separately and compiled, the fused operator."""
    compile_too = case.name in COMPILED_TOO
    baselines = fla(fla_core) | more_baselines()
    rows = function_rows("core", case, core, baselines=baselines, compile_too=compile_too)
    (own,) = (row for row in rows if row.provider == OURS)
    return [*rows, dataclasses.replace(own, provider=f"{OURS}, fused", prepare=direct(fused_core))]


@pytest.mark.parametrize("row", [row for case in CASES for row in core_rows(case)], ids=str)
def bench_core(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
