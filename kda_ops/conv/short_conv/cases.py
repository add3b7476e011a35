"""Inputs of short_conv for tests and benchmarks."""

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
    with_blocks,
    with_dense_blocks,
)


def short_conv_inputs(
    shape: tuple[int, ...],
    W: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    strided: bool = False,
    activation: str | None = "silu",
    lengths: tuple[int, ...] | None = None,
    layout: str | None = None,
    state_indices: tuple[int, ...] = (),
    initial: tuple[int, ...] | None = None,
    num_spec: int = 0,
    num_slots: int = 7,
    state_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `short_conv` for `x [shape]`, with a state if a layout is given.

    Args:
        shape: Shape of x.
        W: Taps.
        dtype: Dtype of x, weight and bias.
        bias: Whether there is a bias.
        strided: Whether x has a row stride above D.
        activation: As in `short_conv`.
        lengths: Tokens of each sequence; the rest of T is padding, filled with NaN.
        layout: Layout of the state; None for a call without one.
        state_indices: Slot of each sequence.
        initial: 0 or 1 for each sequence, or None for none.
        num_spec: Rows of the state beyond W - 1.
        num_slots: Slots of the state.
        state_dtype: Dtype of the state, None for that of x.
        index_dtype: Dtype of offsets and slots.
        device: Device of the tensors.
    """
    D = shape[-1]
    wide = torch.randn(*shape[:-1], 2 * D if strided else D, device=device).to(dtype)
    inputs: dict[str, Any] = {"x": wide[..., :D], "activation": activation}
    inputs["weight"] = torch.randn(D, W, device=device).to(dtype) * W**-0.5
    if bias:
        inputs["bias"] = torch.randn(D, device=device).to(dtype)
    if lengths is not None:
        inputs["x"][..., sum(lengths) :, :] = float("nan")
        offsets = torch.tensor((0, *lengths)).cumsum(0)
        inputs["cu_seqlens"] = offsets.to(device, index_dtype)
    if layout is not None:
        L = W - 1 + num_spec
        inputs["conv_state"] = paged_conv_state(
            num_slots, L, D, layout, state_dtype or dtype, device
        )
        inputs["state_indices"] = torch.tensor(state_indices, dtype=index_dtype, device=device)
        inputs["layout"] = layout
        if initial is not None:
            inputs["has_initial_state"] = torch.tensor(initial, device=device).bool()
    return inputs


def _case(
    name: str,
    *sizes: Any,
    perf: bool = False,
    with_: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    **options: Any,
) -> Case:
    shape = sizes[0]
    elements = 1
    for n in shape:
        elements *= n
    itemsize = (sizes[2] if len(sizes) > 2 else torch.bfloat16).itemsize
    return Case(
        name=name,
        make=lambda device: with_(short_conv_inputs(*sizes, **options, device=device)),
        mutated=("conv_state",) if "layout" in options else (),
        bytes_moved=2 * elements * itemsize,
        perf=perf,
    )


RAGGED = (1, 0, 70, 2, 3, 5)
RAGGED_STATE: dict[str, Any] = {
    "lengths": RAGGED,
    "state_indices": (3, 5, 1, 0, 6, 2),
    "initial": (1, 1, 1, 1, 0, 1),
}

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
    _case("bf16", (2, 37, 64)),
    _case("one-sequence-fp16-bias", (70, 120), 4, torch.float16, bias=True),
    _case("fp32-W2-linear-strided", (2, 9, 120), 2, torch.float32, activation=None, strided=True),
    _case("W3-swish-wide", (1, 5, 264), 3, activation="swish", bias=True),
    _case("ragged-padding", (1, 90, 40), lengths=RAGGED),
    _case("ragged-blocks", (200, 16), lengths=(64, 128), index_dtype=torch.int64),
    _case("empty", (1, 0, 64)),
    _case("no-sequences", (3, 16), lengths=()),
    _case("SD", (3, 8, 120), layout="SD", state_indices=(2, 0, 5), initial=(1, 1, 0), bias=True),
    _case("DS", (3, 8, 120), layout="DS", state_indices=(2, 0, 5), initial=(1, 1, 0), num_spec=2),
    _case("SD-no-initial-short", (2, 2, 24), layout="SD", state_indices=(4, 1)),
    _case("SD-ragged", (90, 40), **RAGGED_STATE, layout="SD", num_spec=3),
    _case("DS-ragged-fp16", (1, 90, 40), 4, torch.float16, **RAGGED_STATE, layout="DS"),
    _case(
        "DS-ragged-fp32-W2",
        (90, 24),
        2,
        torch.float32,
        **RAGGED_STATE,
        layout="DS",
        index_dtype=torch.int64,
        strided=True,
    ),
    _case("SD-fp32-state", (90, 24), **RAGGED_STATE, layout="SD", state_dtype=torch.float32),
    _case("SD-blocks", (200, 24), **BLOCKS, layout="SD", num_spec=2),
    _case("DS-blocks-fp32", (2, 130, 24), 3, torch.float32, **DENSE_BLOCKS, layout="DS"),
    _case("T8192-D12288", (1, 8192, 12288), perf=True),
    _case(
        "SD-T8192-D12288",
        (1, 8192, 12288),
        perf=True,
        layout="SD",
        state_indices=(3,),
        initial=(1,),
    ),
    _case(
        "DS-T8192-D12288-varlen",
        (8192, 12288),
        perf=True,
        layout="DS",
        lengths=(4096, 1000, 2096, 1000),
        state_indices=(3, 1, 2, 4),
        initial=(1, 0, 1, 0),
    ),
]

CASES += [
    *map(dense, named(CASES, "DS", "SD-ragged")),
    *map(negative, named(CASES, "DS", "SD-ragged")),
]
