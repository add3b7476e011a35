"""Inputs of the gated RMSNorm for tests and benchmarks."""

from math import prod
from typing import Any

import torch

from kda_ops._cases import Case


def rms_norm_gated_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    gate_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype = torch.float32,
    strided: bool = False,
    size: float = 1.0,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `rms_norm_gated`.

    `strided` makes o head-major in memory and gate a slice of a wider projection.
    """
    gate_dtype = dtype if gate_dtype is None else gate_dtype
    if strided:
        B, T, HV, V = shape
        o = torch.randn(B, HV, T, V, device=device).to(dtype).transpose(1, 2)
        output_gate = torch.randn(B, T, 2 * HV, V, device=device).to(gate_dtype)[:, :, HV:]
    else:
        o = torch.randn(shape, device=device).to(dtype)
        output_gate = torch.randn(shape, device=device).to(gate_dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(weight_dtype)
    return {"o": o * size, "output_gate": output_gate * 3, "weight": weight}


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
        make=lambda device: rms_norm_gated_inputs(shape, dtype, device=device, **kw),
        bytes_moved=prod(shape) * 3 * dtype.itemsize,
        perf=perf,
    )


CASES = [
    _case("bf16", (2, 37, 3, 64)),
    _case("bf16-weight-bf16", (1, 20, 2, 128), weight_dtype=torch.bfloat16),
    _case("fp16-V96", (1, 19, 2, 96), torch.float16),
    _case("fp32-V256", (1, 9, 2, 256), torch.float32),
    _case("fp32-gate-bf16", (1, 9, 2, 64), torch.float32, gate_dtype=torch.bfloat16),
    _case("strided", (2, 33, 4, 128), strided=True),
    _case("tiny-fp32", (1, 12, 2, 64), torch.float32, size=1e-3),
    _case("two-axes", (40, 48)),
    _case("fp64", (2, 3, 16), torch.float64),
    _case("empty", (1, 0, 2, 64)),
    _case("T8192-H32", (1, 8192, 32, 128), perf=True),
]
