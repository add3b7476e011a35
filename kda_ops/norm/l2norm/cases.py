"""Inputs of the L2 norm for tests and benchmarks."""

from math import prod
from typing import Any

import torch

from kda_ops._cases import Case


def l2norm_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    strided: bool = False,
    transposed: bool = False,
    zero: bool = False,
    size: float = 1.0,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `l2norm`: normally distributed x, as a slice of a wider projection (`strided`),
    with its second and third axes swapped in memory (`transposed`) or zero in every other row.
    """
    if transposed:
        x = torch.randn(shape[0], shape[2], shape[1], shape[3], device=device).transpose(1, 2)
    else:
        x = (
            torch.randn(*shape[:-2], 3 * shape[-2], shape[-1], device=device)
            if strided
            else torch.randn(shape, device=device)
        )
        x = x[..., shape[-2] : 2 * shape[-2], :] if strided else x
    x = (x * size).to(dtype)
    if zero:
        x[:, ::2] = 0
    return {"x": x}


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
        make=lambda device: l2norm_inputs(shape, dtype, device=device, **kw),
        bytes_moved=prod(shape) * 2 * dtype.itemsize,
        perf=perf,
    )


CASES = [
    _case("bf16", (2, 37, 3, 64)),
    _case("fp16-K96", (1, 19, 2, 96), torch.float16),
    _case("fp32-K256", (1, 9, 2, 256), torch.float32),
    _case("strided", (2, 33, 4, 128), strided=True),
    _case("transposed-fp32", (2, 17, 3, 32), torch.float32, transposed=True),
    _case("zero-rows", (1, 12, 2, 64), zero=True),
    _case("tiny-fp32", (1, 12, 2, 64), torch.float32, size=1e-4),
    _case("five-axes", (2, 3, 2, 3, 16)),
    _case("two-axes-K1", (5, 1)),
    _case("fp64", (2, 3, 16), torch.float64),
    _case("empty", (1, 0, 2, 64)),
    _case("T8192-H32", (1, 8192, 32, 128), perf=True),
    _case("strided-T8192-H32", (1, 8192, 32, 128), strided=True, perf=True),
]
