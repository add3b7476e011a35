"""Inputs of the gate for tests and benchmarks."""

from typing import Any

import torch

from kda_ops._cases import Case


def gate_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    bounded: bool = False,
    harsh: bool = False,
    bias: bool = True,
    strided: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `gate` with the rates of a trained model (`a` from 1 to 16), or with decays down
    to e^-60 per token when `harsh`.
    """
    HV, K = shape[-2:]
    wide = torch.randn(*shape[:-1], 2 * K if strided else K, device=device)
    A_log = torch.empty(HV, device=device).uniform_(1, 16).log()
    inputs: dict[str, Any] = {
        "raw_gate": (wide * (4 if harsh else 1)).to(dtype)[..., :K],
        "A_log": A_log,
    }
    if harsh:
        inputs["A_log"] = torch.full((HV,), 16.0, device=device).log()
    if bias:
        inputs["dt_bias"] = torch.randn(HV, K, device=device)
    if bounded:
        inputs["lower_bound"] = -5.0
    return inputs


def _case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    perf: bool = False,
    **kw: Any,
) -> Case:
    elements = 1
    for n in shape:
        elements *= n
    return Case(
        name=name,
        cpu_only=dtype == torch.float64,
        make=lambda device: gate_inputs(shape, dtype, device=device, **kw),
        bytes_moved=elements * (dtype.itemsize + 4),
        perf=perf,
    )


CASES = [
    _case("softplus-bf16", (2, 37, 3, 64)),
    _case("softplus-fp16", (1, 65, 2, 128), torch.float16),
    _case("softplus-fp32-K24", (1, 19, 2, 24), torch.float32),
    _case("softplus-harsh", (1, 70, 2, 128), harsh=True),
    _case("softplus-no-bias-strided", (33, 2, 32), bias=False, strided=True),
    _case("bounded-bf16", (2, 37, 3, 64), bounded=True),
    _case("bounded-harsh-fp32", (1, 40, 2, 96), torch.float32, bounded=True, harsh=True),
    _case("softplus-fp64", (1, 9, 2, 16), torch.float64),
    _case("empty", (1, 0, 2, 64)),
    _case("softplus-T8192-H32", (1, 8192, 32, 128), perf=True),
    _case("bounded-T8192-H32", (1, 8192, 32, 128), bounded=True, perf=True),
]
