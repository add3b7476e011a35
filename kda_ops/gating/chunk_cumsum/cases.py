"""Inputs of the chunk-local cumulative sum for tests and benchmarks."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from kda_ops._cases import Case
from kda_ops._numerics import RCP_LN2
from kda_ops.varlen import prepare_chunk_indices


def chunk_cumsum_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    harsh: bool = False,
    strided: bool = False,
    lengths: Sequence[int] | None = None,
    offsets_dtype: torch.dtype = torch.int32,
    table: bool = False,
    chunk_size: int = 64,
    scale: float = RCP_LN2,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `chunk_cumsum`: decays of up to e^-1 per token, or e^-60 when `harsh`; padding
    rows are NaN.
    """
    wide = torch.rand(*shape[:-1], shape[-1] * (2 if strided else 1), device=device)
    g = (wide * (-60 if harsh else -1)).to(dtype)[..., : shape[-1]]
    inputs: dict[str, Any] = {"g": g, "chunk_size": chunk_size, "scale": scale}
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, offsets_dtype)
        g[:, sum(lengths) :] = torch.nan
        inputs["cu_seqlens"] = offsets
        if table:
            inputs["chunk_indices"] = prepare_chunk_indices(offsets, shape[1], chunk_size)
    return inputs


def _case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    perf: bool = False,
    **kw: Any,
) -> Case:
    return Case(
        name=name,
        cpu_only=dtype == torch.float64,
        make=lambda device: chunk_cumsum_inputs(shape, dtype, device=device, **kw),
        bytes_moved=prod(shape) * (dtype.itemsize + 4),
        perf=perf,
    )


CASES = [
    _case("fp32", (2, 128, 3, 64)),
    _case("fp32-harsh-ragged-end", (1, 150, 2, 128), harsh=True),
    _case("bf16-two-batches-ragged-end", (2, 70, 2, 24), torch.bfloat16),
    _case("fp16-strided", (2, 65, 40), torch.float16, strided=True),
    _case("no-trailing-axes", (3, 100)),
    _case("chunk-32", (1, 100, 2, 32), chunk_size=32, scale=1.0),
    _case("chunk-256", (1, 300, 48), chunk_size=256),
    _case("varlen", (1, 200, 2, 32), lengths=(100, 1, 64, 35)),
    _case("varlen-empty-and-padding", (1, 230, 2, 32), lengths=(0, 65, 0, 64, 3, 0), table=True),
    _case("varlen-int64-mostly-padding", (1, 190, 40), lengths=(1,), offsets_dtype=torch.int64),
    _case("varlen-chunk-32-harsh", (1, 90, 2, 96), lengths=(33, 31, 20), chunk_size=32, harsh=True),
    _case("varlen-all-padding", (1, 70, 16), lengths=(0,)),
    _case("varlen-no-sequences", (1, 70, 16), lengths=()),
    _case("fp64", (1, 70, 16), torch.float64),
    _case("empty", (1, 0, 2, 16)),
    _case("T8192-H32", (1, 8192, 32, 128), perf=True),
    _case("varlen-8x1024-H32", (1, 8192, 32, 128), lengths=(1024,) * 8, table=True, perf=True),
]
