"""Inputs of the whole decode step for tests and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._cases import Case, dense, k_first, named, negative, paged_conv_state, unpacked


def paged_states(
    slots: int, shape: tuple[int, ...], dtype: torch.dtype, padding: int, device: torch.device
) -> Tensor:
    """`[slots, *shape]` random states in pages, each followed by `padding` NaN elements."""
    elements = torch.Size(shape).numel()
    pages = torch.full((slots, elements + padding), float("nan"), dtype=dtype, device=device)
    view = pages[:, :elements].unflatten(1, shape)
    return view.copy_(torch.randn(view.shape, device=device))


def kda_decode_inputs(
    N: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    layout: str = "SD",
    dtype: torch.dtype = torch.bfloat16,
    *,
    W: int = 4,
    bias: bool = False,
    activation: str | None = "silu",
    rate: bool = True,
    dt_bias: bool = True,
    bounded: bool = False,
    harsh: bool = False,
    beta_scale: float = 1.0,
    conv_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    padding_rows: int = 0,
    num_spec: int | None = None,
    accepted: tuple[int, ...] | None = None,
    null: tuple[int, ...] = (),
    null_tokens: tuple[tuple[int, int], ...] = (),
    room: int = 0,
    strided: bool = False,
    padding: int = 24,
    index_dtype: torch.dtype = torch.int32,
    unpack: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `kda_decode`.

    Args:
        N: Sequences; `null` of them are mapped to the null block.
        H: Query and key heads.
        HV: Value heads.
        K: Key dimension.
        V: Value dimension.
        layout: Layout of the convolution state.
        dtype: Dtype of the activations, the convolution's weights and its state.
        W: Taps.
        bias: Whether the convolution has a bias.
        activation: Activation of the convolution.
        rate: Whether there is an `A_log`.
        dt_bias: Whether there is a `dt_bias`.
        bounded: Whether the gate is bounded.
        harsh: Decays down to e^-60 a token.
        beta_scale: As in `kda_decode`.
        conv_dtype: Dtype of the convolution state, None for `dtype`.
        state_dtype: Dtype of the recurrent state.
        lengths: Tokens of each sequence, for `cu_seqlens`; None is one each.
        padding_rows: Rows after the last sequence, filled with NaN.
        num_spec: Makes `state_indices` two-dimensional, with `1 + num_spec` columns.
        accepted: `num_accepted`.
        null: Sequences on the null block.
        null_tokens: (sequence, token) pairs whose state is not kept.
        room: Rows of the convolution state beyond those of the speculative tokens.
        strided: Whether the activations are slices of one wide row.
        padding: Elements after each page.
        index_dtype: Dtype of slots, counts and offsets.
        unpack: Whether q, k and v are separate tensors in the convolution.
        device: Device of the tensors.
    """
    tokens = N if lengths is None else sum(lengths)
    rows, D = tokens + padding_rows, 2 * H * K + HV * V
    widths = [D, HV * K, HV * V, HV]
    parts = [torch.randn(rows, width, device=device) for width in widths]
    if strided:
        parts = list(torch.cat(parts, dim=1).to(dtype).split(widths, dim=1))
    x, raw_gate, output_gate, raw_beta = (part.to(dtype) for part in parts)
    for part in (x, raw_gate, output_gate, raw_beta):
        part[tokens:] = float("nan")
    columns = 1 if num_spec is None else 1 + num_spec
    slots = N * columns + 3
    table = torch.randperm(slots - 1, device=device)[: N * columns].view(N, columns) + 1
    for n in null:
        table[n] = 0
    for n, j in null_tokens:
        table[n, j] = 0
    inputs: dict[str, Any] = {
        "x": x,
        "conv_state": paged_conv_state(
            slots, W - 1 + (num_spec or 0) + room, D, layout, conv_dtype or dtype, device
        ),
        "weight": (torch.randn(D, W, device=device) * W**-0.5).to(dtype),
        "activation": activation,
        "raw_gate": (raw_gate * 4 if harsh else raw_gate).unflatten(1, (HV, K))[None],
        "raw_beta": raw_beta[None],
        "output_gate": output_gate.unflatten(1, (HV, V))[None],
        "A_log": torch.empty(HV, device=device).uniform_(1, 16).log() if rate else None,
        "beta_scale": beta_scale,
        "norm_weight": torch.randn(V, device=device).to(dtype),
        "state": paged_states(slots, (HV, V, K), state_dtype, padding, device),
        "state_indices": (table[:, 0] if num_spec is None else table).to(index_dtype),
        "layout": layout,
    }
    if harsh:
        inputs["A_log"] = torch.full((HV,), 16.0, device=device).log()
    if bias:
        inputs["bias"] = torch.randn(D, device=device).to(dtype)
    if dt_bias:
        inputs["dt_bias"] = torch.randn(HV, K, device=device)
    if bounded:
        inputs["lower_bound"] = -5.0
    if accepted is not None:
        inputs["num_accepted"] = torch.tensor(accepted, dtype=index_dtype, device=device)
    if lengths is not None:
        offsets = F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
        inputs["cu_seqlens"] = offsets.to(device=device, dtype=index_dtype)
    return unpacked(inputs, (H * K, H * K, HV * V)) if unpack else inputs


def _case(name: str, *sizes: int, perf: bool = False, **options: Any) -> Case:
    N, H, HV, K, V = sizes
    lengths = options.get("lengths")
    rows = N if lengths is None else sum(lengths)
    D, past = 2 * H * K + HV * V, options.get("W", 4) - 1
    state_bytes = options.get("state_dtype", torch.float32).itemsize
    writes = rows if options.get("num_spec") is not None else N
    return Case(
        name=name,
        make=lambda device: kda_decode_inputs(N, H, HV, K, V, device=device, **options),
        mutated=("conv_state", "state"),
        bytes_moved=(N + writes) * HV * V * K * state_bytes
        + rows * (D + HV * (K + 2 * V + 1)) * 2
        + (N * past + N * (past - 1) + rows) * D * 2
        + D * (past + 1) * 2,
        perf=perf,
    )


FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
CASES = [
    _case("apart-SD-bf16", 3, 2, 2, 64, 64, null=(1,), bias=True, unpack=True),
    _case("apart-DS-fp32-gva-ragged", 3, 2, 4, 16, 24, layout="DS", dtype=FP32, W=3, room=2,
          lengths=(2, 3, 0), padding_rows=1, bias=True, conv_dtype=BF16, strided=True, unpack=True),
    _case("apart-SD-V-blocks", 1, 1, 2, 160, 256, dtype=FP32, unpack=True),
    _case("SD-bf16", 3, 2, 2, 64, 64, null=(1,)),
    _case("DS-fp16-gva-K24-V40", 3, 2, 4, 24, 40, layout="DS", dtype=FP16, bias=True, null=(2,)),
    _case("SD-fp32-strided-W2", 2, 2, 2, 32, 16, dtype=FP32, W=2, strided=True, activation=None),
    _case("DS-bf16-state-harsh", 2, 1, 1, 128, 32, layout="DS", state_dtype=BF16, harsh=True),
    _case("SD-fp32-bounded", 2, 1, 2, 32, 32, dtype=FP32, bounded=True, beta_scale=2.0),
    _case("DS-fp32-bounded-no-rate", 2, 1, 1, 16, 16, layout="DS", dtype=FP32, bounded=True,
          rate=False, dt_bias=False, room=2),
    _case("SD-K256-V200", 1, 1, 1, 256, 200, index_dtype=torch.int64),
    _case("SD-ragged", 4, 1, 2, 32, 32, lengths=(1, 0, 1, 1), padding_rows=3, null=(2,)),
    _case("DS-ragged-several", 3, 2, 2, 16, 24, layout="DS", dtype=FP32, W=3, room=2,
          lengths=(2, 3, 0), padding_rows=1, bias=True, conv_dtype=BF16, strided=True),
    _case("SD-speculative", 5, 1, 3, 48, 64, dtype=FP32, lengths=(2, 3, 0, 1, 2), padding_rows=3,
          num_spec=2, accepted=(1, 2, 3, 0, 3), null=(3,), null_tokens=((1, 1), (4, 0)),
          index_dtype=torch.int64),
    _case("DS-speculative", 3, 1, 1, 64, 32, layout="DS", lengths=(3, 3, 3), num_spec=2,
          accepted=(3, 1, 2), strided=True),
    _case("SD-speculative-8", 1, 1, 1, 16, 16, dtype=FP32, lengths=(8,), num_spec=7,
          accepted=(5,)),
    _case("SD-speculative-V-blocks", 1, 1, 2, 160, 256, dtype=FP32, lengths=(2,), num_spec=1,
          accepted=(2,)),
    _case("SD-slot-table", 2, 1, 1, 16, 16, dtype=FP32, num_spec=1, accepted=(2, 1)),
    _case("empty", 0, 2, 2, 32, 32),
    _case("empty-ragged", 0, 2, 2, 32, 32, lengths=(), padding_rows=3),
    *[
        _case(f"{layout}-batch{N}-H32", N, 32, 32, 128, 128, layout=layout, padding=0, perf=True)
        for layout in ("SD", "DS")
        for N in (1, 16, 64, 256)
    ],
    _case("apart-SD-batch64-H32", 64, 32, 32, 128, 128, padding=0, unpack=True, perf=True),
    _case("SD-batch64-H32-spec3", 64, 32, 32, 128, 128, lengths=(4,) * 64, num_spec=3,
          accepted=(2,) * 64, padding=0, perf=True),
]  # fmt: skip

CASES += [
    *map(dense, named(CASES, "SD-bf16", "SD-ragged", "apart-DS-fp32-gva-ragged")),
    *map(k_first, named(CASES, "DS-fp16-gva-K24-V40", "SD-speculative", "SD-K256-V200")),
    *map(dense, map(k_first, named(CASES, "DS-bf16-state-harsh"))),
    *map(negative, named(CASES, "SD-bf16", "SD-speculative")),
]
