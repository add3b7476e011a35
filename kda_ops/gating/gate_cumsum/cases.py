"""Inputs of the cumulative gate for tests and benchmarks."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from kda_ops._cases import Case
from kda_ops.varlen import prepare_chunk_indices


def gate_cumsum_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    bounded: bool = False,
    harsh: bool = False,
    bias: bool = True,
    rates: bool = True,
    strided: bool = False,
    lengths: Sequence[int] | None = None,
    offsets_dtype: torch.dtype = torch.int32,
    table: bool = False,
    chunk_size: int = 64,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `gate_cumsum` with the rates of a trained model (`a` from 1 to 16), or with
    decays down to e^-60 per token when `harsh`. Padding rows are NaN.
    """
    HV, K = shape[-2:]
    wide = torch.randn(*shape[:-1], K * (2 if strided else 1), device=device)
    raw_gate = (wide * (4 if harsh else 1)).to(dtype)[..., :K]
    A_log = torch.empty(HV, device=device).uniform_(1, 16).log()
    if harsh:
        A_log = torch.full((HV,), 16.0, device=device).log()
    inputs: dict[str, Any] = {
        "raw_gate": raw_gate,
        "A_log": A_log if rates else None,
        "chunk_size": chunk_size,
    }
    if bias:
        inputs["dt_bias"] = torch.randn(HV * K, device=device)
    if bounded:
        inputs["lower_bound"] = -5.0
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, offsets_dtype)
        raw_gate[:, sum(lengths) :] = torch.nan
        inputs["cu_seqlens"] = offsets
        if table:
            inputs["chunk_indices"] = prepare_chunk_indices(offsets, shape[1], chunk_size)
    return inputs


def _case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    perf: bool = False,
    **kw: Any,
) -> Case:
    return Case(
        name=name,
        cpu_only=dtype == torch.float64,
        make=lambda device: gate_cumsum_inputs(shape, dtype, device=device, **kw),
        bytes_moved=prod(shape) * (dtype.itemsize + 4),
        perf=perf,
    )


CASES = [
    _case("softplus-bf16", (2, 128, 3, 64)),
    _case("softplus-fp16-ragged-end", (2, 70, 2, 128), torch.float16),
    _case("softplus-fp32-K24-chunk-32", (1, 75, 2, 24), torch.float32, chunk_size=32),
    _case("softplus-harsh-strided", (1, 130, 2, 128), harsh=True, strided=True),
    _case("softplus-no-bias", (1, 65, 2, 32), bias=False),
    _case("bounded-bf16", (2, 66, 3, 64), bounded=True),
    _case("bounded-harsh-fp32-K96", (1, 80, 2, 96), torch.float32, bounded=True, harsh=True),
    _case("bounded-no-rates-K256", (1, 40, 1, 256), bounded=True, rates=False),
    _case("varlen", (1, 200, 2, 32), lengths=(100, 1, 64, 35)),
    _case("varlen-empty-and-padding", (1, 230, 2, 32), lengths=(0, 65, 0, 64, 3, 0), table=True),
    _case(
        "varlen-int64-mostly-padding-K160",
        (1, 190, 1, 160),
        lengths=(1,),
        offsets_dtype=torch.int64,
    ),
    _case(
        "varlen-bounded-chunk-32-harsh",
        (1, 90, 2, 96),
        lengths=(33, 31, 20),
        chunk_size=32,
        harsh=True,
        bounded=True,
    ),
    _case("varlen-no-sequences", (1, 70, 1, 16), lengths=()),
    _case("softplus-fp64", (1, 70, 2, 16), torch.float64),
    _case("empty", (1, 0, 2, 64)),
    _case("softplus-T8192-H32", (1, 8192, 32, 128), perf=True),
    _case("bounded-T8192-H32", (1, 8192, 32, 128), bounded=True, perf=True),
    _case(
        "softplus-varlen-8x1024-H32", (1, 8192, 32, 128), lengths=(1024,) * 8, table=True, perf=True
    ),
]
