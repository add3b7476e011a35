"""Inputs of the recurrence for tests and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._cases import Case, dense, k_first, named, negative


def paged_states(
    slots: int, shape: tuple[int, ...], dtype: torch.dtype, padding: int, device: torch.device
) -> Tensor:
    """`[slots, *shape]` random states in pages, each followed by `padding` NaN elements."""
    elements = torch.Size(shape).numel()
    pages = torch.full((slots, elements + padding), float("nan"), dtype=dtype, device=device)
    view = pages[:, :elements].unflatten(1, shape)
    return view.copy_(torch.randn(view.shape, device=device))


def recurrent_inputs(
    N: int,
    tokens: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    state_dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    padding_rows: int = 0,
    num_spec: int | None = None,
    accepted: list[int] | None = None,
    null: tuple[int, ...] = (),
    null_tokens: tuple[tuple[int, int], ...] = (),
    harsh: bool = False,
    strided: bool = False,
    padding: int = 24,
    index_dtype: torch.dtype = torch.int32,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `recurrent_kda`.

    Args:
        N: Sequences; `null` of them are mapped to the null block.
        tokens: Tokens of every sequence; with `lengths` the sequences are packed instead.
        H: Query and key heads.
        HV: Value heads.
        K: Key dimension.
        V: Value dimension.
        dtype: Dtype of q, k, v and beta; g is fp32.
        state_dtype: Dtype of the states.
        lengths: Tokens of each sequence, for `cu_seqlens`.
        padding_rows: Rows after the last sequence.
        num_spec: Makes `state_indices` two-dimensional, with `1 + num_spec` columns.
        accepted: `num_accepted`.
        null: Sequences on the null block.
        null_tokens: (sequence, token) pairs whose state is not kept.
        harsh: Decays down to e^-60 a token.
        strided: Whether q, k and v are slices of one row, as after the convolution.
        padding: Elements after each page.
        index_dtype: Dtype of slots, counts and offsets.
        device: Device of the tensors.
    """
    lead = (N, tokens) if lengths is None else (1, sum(lengths) + padding_rows)
    q, k = (F.normalize(torch.randn(*lead, H, K, device=device), dim=-1) for _ in range(2))
    parts = [q.flatten(-2), k.flatten(-2), torch.randn(*lead, HV * V, device=device)]
    if strided:
        parts = list(torch.cat(parts, dim=-1).to(dtype).split([x.shape[-1] for x in parts], dim=-1))
    q, k, v = (x.to(dtype).unflatten(-1, (n, -1)) for x, n in zip(parts, (H, H, HV), strict=True))
    columns = 1 if num_spec is None else 1 + num_spec
    slots = N * columns + 3
    table = torch.randperm(slots - 1, device=device)[: N * columns].view(N, columns) + 1
    for n in null:
        table[n] = 0
    for n, j in null_tokens:
        table[n, j] = 0
    inputs: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "g": -torch.rand(*lead, HV, K, device=device) * (60.0 if harsh else 2.0),
        "beta": torch.rand(*lead, HV, device=device).to(dtype),
        "state": paged_states(slots, (HV, V, K), state_dtype, padding, device),
        "state_indices": (table[:, 0] if num_spec is None else table).to(index_dtype),
    }
    if accepted is not None:
        inputs["num_accepted"] = torch.tensor(accepted, dtype=index_dtype, device=device)
    if lengths is not None:
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        inputs["cu_seqlens"] = offsets.to(device=device, dtype=index_dtype)
    return inputs


def _case(name: str, *sizes: int, perf: bool = False, **options: Any) -> Case:
    N, tokens, H, HV, K, V = sizes
    lengths = options.get("lengths")
    rows = N * tokens if lengths is None else sum(lengths)
    state_bytes = options.get("state_dtype", torch.float32).itemsize
    writes = rows if options.get("num_spec") is not None else N
    return Case(
        name=name,
        make=lambda device: recurrent_inputs(*sizes, device=device, **options),
        mutated=("state",),
        bytes_moved=(N + writes) * HV * V * K * state_bytes
        + rows * (2 * H * K * 2 + 2 * HV * V * 2 + HV * K * 4 + HV * 2),
        perf=perf,
    )


CASES = [
    _case("decode-bf16", 3, 1, 2, 2, 64, 64),
    _case("decode-fp16-gva-K24-V40", 3, 1, 2, 4, 24, 40, dtype=torch.float16, null=(1,)),
    _case("decode-fp32-strided", 4, 1, 2, 2, 32, 16, dtype=torch.float32, strided=True, null=(3,)),
    _case("decode-bf16-state-harsh", 2, 1, 2, 2, 128, 32, state_dtype=torch.bfloat16, harsh=True),
    _case("decode-K256-V256", 1, 1, 1, 1, 256, 256, index_dtype=torch.int64),
    _case("tokens-3", 2, 3, 1, 2, 32, 32, dtype=torch.float32, strided=True),
    _case("spec-first", 3, 2, 1, 2, 32, 32, num_spec=2, null=(2,)),
    _case(
        "spec-accepted",
        4,
        3,
        2,
        2,
        64,
        48,
        num_spec=2,
        accepted=[3, 1, 0, 2],
        null=(2,),
        null_tokens=((0, 1), (1, 2)),
    ),
    _case("ragged", 4, 0, 2, 2, 32, 32, lengths=[3, 0, 1, 5], padding_rows=4, null=(2,)),
    _case(
        "ragged-spec",
        5,
        0,
        1,
        3,
        48,
        64,
        dtype=torch.float32,
        lengths=[2, 3, 0, 1, 2],
        padding_rows=3,
        num_spec=2,
        accepted=[1, 2, 3, 1, 3],
        null=(3,),
        index_dtype=torch.int64,
    ),
    _case("empty", 0, 1, 2, 2, 32, 32),
    _case("empty-ragged", 0, 0, 2, 2, 32, 32, lengths=[], padding_rows=3),
    *[
        _case(f"batch{N}-H32", N, 1, 32, 32, 128, 128, padding=0, strided=True, perf=True)
        for N in (1, 16, 64, 256)
    ],
    _case("batch64-H32-spec3", 64, 4, 32, 32, 128, 128, num_spec=3, padding=0, perf=True),
]

CASES += [
    *map(dense, named(CASES, "decode-fp32-strided", "tokens-3", "ragged")),
    *map(k_first, named(CASES, "decode-fp16-gva-K24-V40", "spec-accepted")),
    *map(dense, map(k_first, named(CASES, "decode-bf16"))),
    *map(negative, named(CASES, "decode-fp16-gva-K24-V40", "spec-accepted")),
]
