"""Inputs of chunked KDA for tests and benchmarks."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._cases import (
    Case,
    dense,
    k_first,
    named,
    negative,
    with_dense_blocks,
    with_pages,
    with_states,
)
from kda_ops._numerics import CHUNK, RCP_LN2


def cumulative(y: Tensor, cu_seqlens: list[int] | None = None) -> Tensor:
    """Prefix sums of `y [B, T, HV, K]` that restart every 64 tokens and at every sequence start.
    Rows past the last sequence are NaN.
    """
    B, T, HV, K = y.shape
    g_cumsum = torch.full_like(y, torch.nan)
    offsets = [0, T] if cu_seqlens is None else cu_seqlens
    for start, end in itertools.pairwise(offsets):
        padded = F.pad(y[:, start:end], (0, 0, 0, 0, 0, -(end - start) % CHUNK))
        sums = padded.reshape(B, -1, CHUNK, HV, K).cumsum(2).reshape(B, -1, HV, K)
        g_cumsum[:, start:end] = sums[:, : end - start]
    return g_cumsum


def log2_gate(shape: tuple[int, ...], gate: str, device: torch.device) -> Tensor:
    """Per-token gates in log2: `softplus` with rates 1 to 16 as in a trained model, `harsh` down to
    e^-60 and beyond, `slow` near 1, or `bounded` at -5 nats.
    """
    x = torch.randn(shape, device=device)
    if gate == "harsh":
        return -16 * RCP_LN2 * F.softplus(4 * x)
    if gate == "slow":
        return -1e-3 * RCP_LN2 * F.softplus(x)
    if gate == "bounded":
        return -5 * RCP_LN2 * torch.sigmoid(4 * x)
    rate = torch.empty(shape[-2], 1, device=device).uniform_(1, 16)
    return -rate * RCP_LN2 * F.softplus(x)


def chunk_kda_inputs(
    device: torch.device,
    *,
    B: int = 1,
    T: int,
    H: int = 1,
    HV: int | None = None,
    K: int = 128,
    V: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    gate: str = "softplus",
    cu_seqlens: list[int] | None = None,
    index_dtype: torch.dtype = torch.int32,
    packed: bool = False,
    v_scale: float = 1.0,
) -> dict[str, Any]:
    """q, k, v, G, beta and offsets. Rows past the last sequence are NaN. With `packed`, q, k and v
    are slices of one projection.
    """
    HV = HV or H

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)

    rows = torch.randn(B, T, 2 * H * K + HV * V, device=device)
    q, k, v = rows.split([H * K, H * K, HV * V], dim=-1)
    q.copy_(unit(q.unflatten(-1, (H, K))).flatten(-2))
    k.copy_(unit(k.unflatten(-1, (H, K))).flatten(-2))
    v.mul_(v_scale)
    beta = torch.rand(B, T, HV, device=device)
    if cu_seqlens is not None:
        rows[:, cu_seqlens[-1] :] = torch.nan
        beta[:, cu_seqlens[-1] :] = torch.nan
    q, k, v = rows.to(dtype).split([H * K, H * K, HV * V], dim=-1)
    inputs: dict[str, Any] = {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "g_cumsum": cumulative(log2_gate((B, T, HV, K), gate, device), cu_seqlens),
        "beta": beta.to(dtype),
    }
    if not packed:
        inputs = {name: x.contiguous() for name, x in inputs.items()}
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=index_dtype, device=device)
    return inputs


def large_states(device: torch.device) -> dict[str, Any]:
    """States that overflow fp16 with outputs that do not."""
    inputs = chunk_kda_inputs(device, T=100, dtype=torch.float16, gate="slow", v_scale=1e4)
    inputs = with_states(inputs)
    inputs["initial_state"] *= 1e5
    return inputs


def _case(name: str, **kw: Any) -> Case:
    return _made(
        name, lambda device: chunk_kda_inputs(device, **kw), kw.get("dtype", torch.bfloat16)
    )


def _made(
    name: str,
    make: Callable[[torch.device], dict[str, Any]],
    dtype: torch.dtype = torch.bfloat16,
    mutated: tuple[str, ...] = (),
) -> Case:
    return Case(name=name, make=make, mutated=mutated, operand_dtype=dtype)


def _perf(name: str, *, T: int, H: int, sequences: int = 1) -> Case:
    """K = V = 128 in bf16, with the final state."""
    D = 128

    def make(device: torch.device) -> dict[str, Any]:
        cu_seqlens = None if sequences == 1 else list(range(0, T + 1, T // sequences))
        return {
            **chunk_kda_inputs(device, T=T, H=H, cu_seqlens=cu_seqlens),
            "output_final_state": True,
        }

    chunks = T // CHUNK * H
    tile = 2 * CHUNK * CHUNK * D
    return Case(
        name=name,
        make=make,
        bytes_moved=T * H * (4 * D * 2 + D * 4 + 2) + sequences * H * D * D * 4,
        # GEMMs: Aqk, L, w, u, Aqk vn and the inverse; w S, qg S and kg^T vn
        flops=chunks * (6 * tile + 3 * 2 * CHUNK * D * D),
        operand_dtype=torch.bfloat16,
        perf=True,
    )


RAGGED = [0, 0, 1, 65, 65, 129, 150]

CASES = [
    _case("bf16", T=130, H=2),
    _case("bf16-harsh", T=130, gate="harsh"),
    _case("bf16-slow", T=130, gate="slow"),
    _case("bf16-bounded", T=130, gate="bounded"),
    _case("fp16", T=100, dtype=torch.float16),
    _case("fp32", T=70, K=64, V=64, dtype=torch.float32),
    _case("fp32-harsh", T=70, K=64, V=64, dtype=torch.float32, gate="harsh"),
    _case("fp32-K24-V40", T=140, K=24, V=40, dtype=torch.float32),
    _case("grouped-values", T=80, H=2, HV=4, K=64, V=64),
    _case("batch-packed", B=2, T=70, H=2, K=64, V=64, packed=True),
    _case("K64-V96", T=80, K=64, V=96),
    _case("K256-V32", T=70, K=256, V=32),
    _case("K100-V20-fp16", T=70, K=100, V=20, dtype=torch.float16),
    _case("T1", T=1),
    _case("T64", T=64),
    _case("T0", T=0),
    _case("ragged", T=170, cu_seqlens=RAGGED),
    _case("ragged-general", T=170, K=32, V=48, cu_seqlens=RAGGED, index_dtype=torch.int64),
    _case("tail", T=127, K=64, V=64, cu_seqlens=[0, 65]),
    _case("no-sequences", T=10, cu_seqlens=[0]),
    _made("fp16-states-past-65504", large_states, torch.float16),
    _made("states", lambda d: with_states(chunk_kda_inputs(d, T=100, B=2))),
    _made("states-T0", lambda d: with_states(chunk_kda_inputs(d, T=0, B=2, K=64, V=64))),
    _made(
        "states-ragged-bf16",
        lambda d: with_states(chunk_kda_inputs(d, T=160, cu_seqlens=RAGGED), torch.bfloat16),
    ),
    _made(
        "states-fp32",
        lambda d: with_states(chunk_kda_inputs(d, T=70, K=40, V=24, dtype=torch.float32)),
        torch.float32,
    ),
    _made(
        "pages",
        lambda d: with_pages(
            chunk_kda_inputs(d, T=170, cu_seqlens=RAGGED), [2, 3, 0, 7, 1, 5], fresh=[0, 4]
        ),
        mutated=("state",),
    ),
    _made(
        "pages-general-bf16",
        lambda d: with_pages(
            chunk_kda_inputs(d, T=170, H=2, K=48, V=80, cu_seqlens=RAGGED),
            [2, 3, 0, 7, 1, 5],
            [0, 4],
            torch.bfloat16,
        ),
        mutated=("state",),
    ),
    _made(
        "pages-fp32",
        lambda d: with_pages(
            chunk_kda_inputs(d, B=3, T=70, K=16, V=16, dtype=torch.float32), [2, 0, 1], [2]
        ),
        torch.float32,
        mutated=("state",),
    ),
    _made(
        "blocks-fp32",
        lambda d: with_dense_blocks(
            with_pages(
                chunk_kda_inputs(d, B=2, T=130, K=16, V=24, dtype=torch.float32),
                [1, 2],
                [1],
                torch.bfloat16,
                more=6,
            )
        ),
        torch.float32,
        mutated=("state",),
    ),
    _perf("T8192-H32", T=8192, H=32),
    _perf("8x1024-H32", T=8192, H=32, sequences=8),
]

CASES += [
    *map(dense, named(CASES, "pages", "pages-fp32")),
    *map(k_first, named(CASES, "states-fp32", "pages-general-bf16", "blocks-fp32")),
    *map(dense, map(k_first, named(CASES, "pages-general-bf16"))),
    *map(negative, named(CASES, "pages", "pages-fp32")),
]
