"""Inputs of chunked KDA as an affine function for tests and benchmarks."""

from typing import Any

import torch

from kda_ops._cases import Case
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _case(
    name: str,
    *,
    initial: torch.dtype | None = None,
    entered: list[bool] | None = None,
    **options: Any,
) -> Case:
    """With initial states of a dtype, or without."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = chunk_kda_gated_inputs(device, **options)
        if initial is not None:
            N = len(inputs.get("cu_seqlens", inputs["q"])) - ("cu_seqlens" in inputs)
            shape = (N, *inputs["v"].shape[2:], inputs["q"].shape[3])
            inputs["initial_state"] = torch.randn(shape, device=device).to(initial)
        if entered is not None:
            inputs["entered"] = torch.tensor(entered, device=device)
        return inputs

    return Case(name=name, make=make, operand_dtype=options.get("dtype", BF16))


def _perf(name: str, *, T: int, H: int) -> Case:
    """K = V = 128 in bf16, one sequence."""
    D = 128
    tile = 2 * CHUNK * CHUNK * D
    return Case(
        name=name,
        make=lambda device: chunk_kda_gated_inputs(device, T=T, H=H, norm=True),
        bytes_moved=T * H * (6 * D + 1) * 2 + 2 * H * D * D * 4,
        # GEMMs: as `chunk_kda_gated`, and Aqk vn, w S, qg S and kg^T vn of K columns more
        flops=T // CHUNK * H * (7 * tile + 2 * 3 * 2 * CHUNK * D * D),
        operand_dtype=BF16,
        perf=True,
    )


RAGGED = [0, 0, 1, 65, 65, 129, 150]
ENTERED = [True, False, True, True, False, False]

# Gates near 1, or transitions of 0: kernels compute a tiny one exactly beside 1, not beside itself.
CASES = [
    _case("bf16-slow-norm", T=130, H=2, gate="slow", norm=True),
    _case("bf16-harsh-norm-beta2", T=130, gate="harsh", norm=True, beta_scale=2.0),
    _case("bf16-slow-beta2", T=100, gate="slow", beta_scale=2.0),
    _case("bounded-no-rate", T=3, K=64, V=64, gate="bounded", rate=False, dt_bias=False,
          scale=2.0),
    _case("grouped-values-norm", T=80, H=2, HV=4, K=64, V=128, gate="slow", norm=True),
    _case("fp16-norm-large", T=70, K=64, V=64, dtype=FP16, gate="slow", norm=True, size=100.0),
    _case("fp32-norm-states", T=70, K=24, V=40, dtype=FP32, gate="slow", norm=True,
          initial=FP32),
    _case("K100-V20-fp16", T=70, K=100, V=20, dtype=FP16, gate="slow", norm=True),
    _case("fp32-ragged", T=80, K=16, V=16, dtype=FP32, gate="slow", cu_seqlens=[0, 0, 66, 70],
          entered=[True, True, False]),
    _case("batch-packed", B=2, T=70, H=2, K=64, V=64, gate="slow", packed=True, norm=True,
          entered=[False, True]),
    _case("T1", T=1, K=64, V=64, norm=True),
    _case("T0", T=0, K=64, V=64, initial=FP32),
    _case("ragged-norm", T=170, K=64, V=64, gate="slow", cu_seqlens=RAGGED, norm=True,
          initial=BF16, entered=ENTERED),
    _case("ragged-general", T=170, K=32, V=48, gate="slow", cu_seqlens=RAGGED,
          index_dtype=torch.int64, packed=True),
    _case("no-sequences", T=10, K=64, V=64, cu_seqlens=[0]),
    _perf("T8192-H32", T=8192, H=32),
    _perf("T65536-H32", T=65536, H=32),
]  # fmt: skip
