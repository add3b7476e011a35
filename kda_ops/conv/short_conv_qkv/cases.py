"""Inputs of short_conv_qkv for tests and benchmarks."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from kda_ops._cases import (
    BLOCKED_OFFSETS,
    BLOCKED_PAGES,
    BLOCKED_SLOTS,
    Case,
    dense,
    named,
    negative,
    paged_conv_state,
    unpacked,
    with_blocks,
    with_dense_blocks,
)


def short_conv_qkv_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    value_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    W: int = 4,
    bias: bool = False,
    strided: bool = False,
    zero: bool = False,
    activation: str | None = "silu",
    norm_eps: float = 1e-6,
    lengths: tuple[int, ...] | None = None,
    layout: str | None = None,
    state_indices: tuple[int, ...] = (),
    initial: tuple[int, ...] | None = None,
    num_spec: int = 0,
    num_slots: int = 7,
    state_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    unpack: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `short_conv_qkv`, with a state if a layout is given.

    Args:
        B: Sequences of a dense batch.
        T: Tokens of each.
        H: Heads of q and k.
        K: Channels of a head.
        value_dim: Channels of v.
        dtype: Dtype of x, weight and bias.
        W: Taps.
        bias: Whether there is a bias.
        strided: Whether x has a row stride above D.
        zero: Whether the first half of the tokens is zero.
        activation: As in `short_conv_qkv`.
        norm_eps: As in `short_conv_qkv`.
        lengths: Tokens of each sequence; the rest of T is padding, filled with NaN.
        layout: Layout of the state; None for a call without one.
        state_indices: Slot of each sequence.
        initial: 0 or 1 for each sequence, or None for none.
        num_spec: Rows of the state beyond W - 1.
        num_slots: Slots of the state.
        state_dtype: Dtype of the state, None for that of x.
        index_dtype: Dtype of offsets and slots.
        unpack: Whether q, k and v are separate tensors.
        device: Device of the tensors.
    """
    D = 2 * H * K + value_dim
    wide = torch.randn(B, T, 2 * D if strided else D, device=device).to(dtype)
    x = wide[..., :D]
    if zero:
        x[:, : T // 2] = 0
    inputs: dict[str, Any] = {
        "x": x,
        "weight": torch.randn(D, W, device=device).to(dtype) * W**-0.5,
        "bias": torch.randn(D, device=device).to(dtype) if bias else None,
        "key_dim": H * K,
        "head_dim": K,
        "norm_eps": norm_eps,
        "activation": activation,
    }
    if lengths is not None:
        x[:, sum(lengths) :] = float("nan")
        offsets = torch.tensor((0, *lengths)).cumsum(0)
        inputs["cu_seqlens"] = offsets.to(device, index_dtype)
    if layout is not None:
        inputs["conv_state"] = paged_conv_state(
            num_slots, W - 1 + num_spec, D, layout, state_dtype or dtype, device
        )
        inputs["state_indices"] = torch.tensor(state_indices, dtype=index_dtype, device=device)
        inputs["layout"] = layout
        if initial is not None:
            inputs["has_initial_state"] = torch.tensor(initial, device=device).bool()
    return unpacked(inputs, (H * K, H * K, value_dim)) if unpack else inputs


def _case(
    name: str,
    *sizes: Any,
    perf: bool = False,
    with_: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    **options: Any,
) -> Case:
    B, T, H, K, value_dim = sizes[:5]
    dtype = sizes[5] if len(sizes) > 5 else torch.bfloat16
    return Case(
        name=name,
        cpu_only=dtype == torch.float64,
        make=lambda device: with_(short_conv_qkv_inputs(*sizes, **options, device=device)),
        mutated=("conv_state",) if "layout" in options else (),
        bytes_moved=2 * B * T * (2 * H * K + value_dim) * dtype.itemsize,
        perf=perf,
    )


RAGGED: dict[str, Any] = {
    "lengths": (1, 0, 20, 2, 3, 5),
    "state_indices": (3, 5, 1, 0, 6, 2),
    "initial": (1, 1, 1, 1, 0, 1),
}
THREE: dict[str, Any] = {"state_indices": (2, 0, 5), "initial": (1, 1, 0)}

BLOCKS: dict[str, Any] = {
    "lengths": tuple(end - start for start, end in itertools.pairwise(BLOCKED_OFFSETS)),
    "state_indices": BLOCKED_SLOTS,
    "initial": (0, 1, 1, 1),
    "num_slots": BLOCKED_PAGES,
    "with_": with_blocks,
}
DENSE_BLOCKS: dict[str, Any] = {
    "state_indices": (1, 2),
    "initial": (0, 1),
    "with_": with_dense_blocks,
}

CASES = [
    _case("apart-SD-ragged-bias", 1, 40, 2, 64, 96, **RAGGED, layout="SD", bias=True, unpack=True),
    _case("fp32-K5-linear", 1, 6, 2, 5, 7, torch.float32, W=2, activation=None, bias=True),
    _case("K128", 2, 19, 3, 128, 520),
    _case("K64-fp16-bias", 1, 21, 5, 64, 192, torch.float16, bias=True),
    _case("K96-fp32-strided", 2, 9, 3, 96, 300, torch.float32, strided=True),
    _case("K24-W3-swish", 1, 11, 11, 24, 130, W=3, activation="swish", bias=True),
    _case("K256", 1, 9, 1, 256, 64),
    _case("zero-tokens", 1, 14, 2, 64, 128, zero=True),
    _case("large-eps", 1, 9, 2, 32, 40, norm_eps=0.5),
    _case("ragged-padding", 1, 40, 2, 64, 96, lengths=(1, 0, 20, 2, 3, 5)),
    _case("fp64", 1, 7, 2, 8, 12, torch.float64, bias=True),
    _case("empty", 2, 0, 2, 64, 64),
    _case("no-sequences", 1, 3, 2, 16, 16, lengths=()),
    _case("SD", 3, 8, 2, 64, 72, layout="SD", **THREE, bias=True),
    _case("DS", 3, 8, 2, 24, 72, layout="DS", **THREE, num_spec=2),
    _case("SD-no-initial-short", 2, 2, 1, 12, 12, layout="SD", state_indices=(4, 1)),
    _case("SD-ragged", 1, 40, 1, 128, 260, **RAGGED, layout="SD", num_spec=3),
    _case("DS-ragged-fp16-K96", 1, 40, 3, 96, 96, torch.float16, **RAGGED, layout="DS"),
    _case(
        "DS-ragged-fp32-W2",
        *(1, 40, 2, 24, 50, torch.float32),
        W=2,
        **RAGGED,
        layout="DS",
        index_dtype=torch.int64,
        strided=True,
    ),
    _case("SD-fp32-state", 1, 40, 2, 16, 40, **RAGGED, layout="SD", state_dtype=torch.float32),
    _case(
        "DS-fp64", 2, 5, 1, 6, 9, torch.float64, layout="DS", state_indices=(3, 0), initial=(1, 1)
    ),
    _case(
        "apart-fp32-K24-bias-strided",
        2,
        9,
        3,
        24,
        50,
        torch.float32,
        strided=True,
        bias=True,
        unpack=True,
    ),
    _case(
        "apart-DS", 3, 8, 2, 24, 72, torch.float16, layout="DS", **THREE, num_spec=2, unpack=True
    ),
    _case("apart-ragged-K128", 1, 40, 1, 128, 300, lengths=(1, 0, 20, 2, 3, 5), unpack=True),
    _case(
        "apart-fp64",
        2,
        5,
        1,
        6,
        9,
        torch.float64,
        layout="DS",
        state_indices=(3, 0),
        initial=(1, 1),
        unpack=True,
    ),
    _case("DS-blocks", 1, 200, 1, 8, 12, **BLOCKS, layout="DS", num_spec=2, strided=True),
    _case(
        "apart-SD-blocks-fp32",
        2,
        130,
        1,
        12,
        20,
        torch.float32,
        **DENSE_BLOCKS,
        layout="SD",
        state_dtype=torch.bfloat16,
        unpack=True,
    ),
    _case("T8192-H32", 1, 8192, 32, 128, 4096, perf=True),
    _case(
        "SD-T8192-H32",
        1,
        8192,
        32,
        128,
        4096,
        perf=True,
        layout="SD",
        state_indices=(3,),
        initial=(1,),
    ),
    _case(
        "DS-T8192-H32-varlen",
        *(1, 8192, 32, 128, 4096),
        perf=True,
        layout="DS",
        lengths=(4096, 1000, 2096, 1000),
        state_indices=(3, 1, 2, 4),
        initial=(1, 0, 1, 0),
    ),
    _case(
        "apart-SD-T8192-H32",
        *(1, 8192, 32, 128, 4096),
        perf=True,
        layout="SD",
        state_indices=(3,),
        initial=(1,),
        unpack=True,
    ),
]

CASES += [
    *map(dense, named(CASES, "DS", "apart-SD-ragged-bias")),
    *map(negative, named(CASES, "SD", "apart-SD-ragged-bias")),
]
