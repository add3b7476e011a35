"""Inputs of chunked KDA from raw inputs for tests and benchmarks."""

from collections.abc import Callable
from typing import Any

import torch

from kda_ops._cases import (
    BLOCKED_FRESH,
    BLOCKED_OFFSETS,
    BLOCKED_SLOTS,
    Case,
    dense,
    k_first,
    named,
    negative,
    with_blocks,
    with_dense_blocks,
    with_pages,
    with_states,
)
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _case(
    name: str, with_: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **options: Any
) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        inputs = chunk_kda_gated_inputs(device, **options)
        return inputs if with_ is None else with_(inputs)

    return Case(
        name=name,
        make=make,
        mutated=("state",) if name.startswith("pages") else (),
        operand_dtype=options.get("dtype", BF16),
    )


def _perf(name: str, *, T: int, H: int, sequences: int = 1, pages: int = 0, **options: Any) -> Case:
    """K = V = 128 in bf16, with the final state; or with so many pages for it and for the states at
    equally many block boundaries.
    """
    D = 128

    def make(device: torch.device) -> dict[str, Any]:
        cu_seqlens = None if sequences == 1 else list(range(0, T + 1, T // sequences))
        inputs = chunk_kda_gated_inputs(device, T=T, H=H, cu_seqlens=cu_seqlens, **options)
        if not pages:
            return {**inputs, "output_final_state": True}
        inputs = with_pages(inputs, [1], [0], more=pages)
        inputs["state"].nan_to_num_()  # pages that nobody reads, but results are compared
        if pages > 1:
            table = torch.arange(2, pages + 1, dtype=torch.int32, device=device)
            inputs |= {"block_table": table[None], "block_tokens": T // (pages - 1)}
        return inputs

    chunks = T // CHUNK * H
    tile = 2 * CHUNK * CHUNK * D
    return Case(
        name=name,
        make=make,
        mutated=("state",) if pages else (),
        bytes_moved=T * H * (5 * D + 1) * 2 + max(sequences, pages) * H * D * D * 4,
        # GEMMs: Aqk, L, w, u, Aqk vn and the inverse; w S, qg S and kg^T vn
        flops=chunks * (6 * tile + 3 * 2 * CHUNK * D * D),
        operand_dtype=BF16,
        perf=True,
    )


RAGGED = [0, 0, 1, 65, 65, 129, 150]
SLOTS, FRESH = [2, 3, 0, 7, 1, 5], [0, 4]

CASES = [
    _case("bf16", T=130, H=2),
    _case("bf16-norm", T=130, H=2, norm=True),
    _case("bf16-harsh-norm-beta2", T=130, gate="harsh", norm=True, beta_scale=2.0),
    _case("bf16-slow", T=100, gate="slow"),
    _case("bf16-bounded-norm", T=100, gate="bounded", norm=True),
    _case("bounded-no-rate", T=70, K=64, V=64, gate="bounded", rate=False, dt_bias=False),
    _case("scale-small-norm", T=70, K=64, V=64, norm=True, scale=1e-6),
    _case("scale-2-norm", T=70, K=64, V=64, norm=True, scale=2.0),
    _case("no-bias", T=70, K=64, V=128, dt_bias=False),
    _case("fp16-norm-large", T=100, dtype=FP16, norm=True, size=100.0),
    _case("fp16-norm-small", T=70, dtype=FP16, norm=True, size=0.01, gate="slow"),
    _case("fp32-norm", T=70, K=64, V=64, dtype=FP32, norm=True),
    _case("fp32-harsh-beta2", T=70, K=24, V=40, dtype=FP32, gate="harsh", beta_scale=2.0),
    _case("fp32-bounded", T=70, K=32, V=16, dtype=FP32, gate="bounded"),
    _case("grouped-values-norm", T=80, H=2, HV=4, K=64, V=64, norm=True),
    _case("grouped-values-general-norm", T=70, H=2, HV=4, K=48, V=32, norm=True),
    _case("batch-packed", B=2, T=70, H=2, K=64, V=64, packed=True, norm=True),
    _case("K100-V20-fp16", T=70, K=100, V=20, dtype=FP16, norm=True),
    _case("T1", T=1, norm=True),
    _case("T64", T=64),
    _case("T0", T=0),
    _case("ragged-norm", T=170, cu_seqlens=RAGGED, norm=True),
    _case("ragged-general-norm", T=170, K=32, V=48, cu_seqlens=RAGGED, index_dtype=torch.int64,
          norm=True, packed=True),
    _case("no-sequences", T=10, cu_seqlens=[0]),
    _case("states", with_states, T=100, B=2, K=64, V=64, norm=True),
    _case("states-ragged-bf16", lambda x: with_states(x, BF16), T=160, cu_seqlens=RAGGED),
    _case("states-fp32", with_states, T=70, K=40, V=24, dtype=FP32),
    _case("pages", lambda x: with_pages(x, SLOTS, FRESH), T=170, cu_seqlens=RAGGED, norm=True),
    _case("pages-general-bf16", lambda x: with_pages(x, SLOTS, FRESH, BF16), T=170, K=48, V=80,
          cu_seqlens=RAGGED),
    _case("pages-fp32", lambda x: with_pages(x, [2, 0, 1], [2]), B=3, T=70, K=16, V=16,
          dtype=FP32, norm=True, beta_scale=2.0),
    _case("pages-blocks",
          lambda x: with_blocks(with_pages(x, BLOCKED_SLOTS, BLOCKED_FRESH, BF16, more=7)),
          T=200, K=64, V=64, cu_seqlens=BLOCKED_OFFSETS, norm=True),
    _case("pages-blocks-fp32", lambda x: with_dense_blocks(with_pages(x, [1, 2], [1], more=6)),
          B=2, T=130, K=16, V=24, dtype=FP32, norm=True),
    _perf("norm-T8192-H32", T=8192, H=32, norm=True),
    _perf("norm-pages-T8192-H32", T=8192, H=32, norm=True, pages=1),
    _perf("norm-blocks512-T8192-H32", T=8192, H=32, norm=True, pages=17),
    _perf("T8192-H32", T=8192, H=32),
    _perf("norm-bounded-T8192-H32", T=8192, H=32, norm=True, gate="bounded"),
    _perf("norm-8x1024-H32", T=8192, H=32, sequences=8, norm=True),
]  # fmt: skip

CASES += [
    *map(dense, named(CASES, "pages", "pages-fp32")),
    *map(k_first, named(CASES, "states-fp32", "pages-general-bf16")),
    *map(dense, map(k_first, named(CASES, "pages-fp32"))),
    *map(negative, named(CASES, "pages")),
]
