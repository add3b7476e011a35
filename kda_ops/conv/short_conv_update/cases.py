"""Inputs of short_conv_update for tests and benchmarks."""

from typing import Any

import torch

from kda_ops._cases import Case, dense, named, negative, paged_conv_state


def short_conv_update_inputs(
    shape: tuple[int, ...],
    layout: str,
    state_indices: Any,
    W: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    strided: bool = False,
    activation: str | None = "silu",
    lengths: tuple[int, ...] | None = None,
    accepted: tuple[int, ...] | None = None,
    num_spec: int = 0,
    num_slots: int = 7,
    state_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `short_conv_update` for `x [shape]`.

    Args:
        shape: Shape of x.
        layout: Layout of the state.
        state_indices: Slot of each sequence; nested for a table with a column per token.
        W: Taps.
        dtype: Dtype of x, weight and bias.
        bias: Whether there is a bias.
        strided: Whether x has a row stride above D.
        activation: As in `short_conv_update`.
        lengths: Tokens of each sequence; the rest of T is padding, filled with NaN.
        accepted: Accepted tokens of each sequence.
        num_spec: Rows of the state beyond W - 1.
        num_slots: Slots of the state.
        state_dtype: Dtype of the state, None for that of x.
        index_dtype: Dtype of offsets, slots and counts.
        device: Device of the tensors.
    """
    D = shape[-1]
    wide = torch.randn(*shape[:-1], 2 * D if strided else D, device=device).to(dtype)
    inputs: dict[str, Any] = {
        "x": wide[..., :D],
        "conv_state": paged_conv_state(
            num_slots, W - 1 + num_spec, D, layout, state_dtype or dtype, device
        ),
        "weight": torch.randn(D, W, device=device).to(dtype) * W**-0.5,
        "activation": activation,
        "state_indices": torch.tensor(state_indices, dtype=index_dtype, device=device),
        "layout": layout,
    }
    if bias:
        inputs["bias"] = torch.randn(D, device=device).to(dtype)
    if accepted is not None:
        inputs["num_accepted"] = torch.tensor(accepted, dtype=index_dtype, device=device)
    if lengths is not None:
        inputs["x"][sum(lengths) :] = float("nan")
        offsets = torch.tensor((0, *lengths)).cumsum(0)
        inputs["cu_seqlens"] = offsets.to(device, index_dtype)
    return inputs


def _case(name: str, *sizes: Any, perf: bool = False, **options: Any) -> Case:
    shape, W = sizes[0], sizes[3] if len(sizes) > 3 else 4
    tokens = 1
    for n in shape[:-1]:
        tokens *= n
    itemsize = (sizes[4] if len(sizes) > 4 else torch.bfloat16).itemsize
    state_rows = shape[0] * (2 * (W - 1) if perf else 0)
    return Case(
        name=name,
        make=lambda device: short_conv_update_inputs(*sizes, **options, device=device),
        mutated=("conv_state",),
        bytes_moved=(2 * tokens + state_rows + W) * shape[-1] * itemsize,
        perf=perf,
    )


SPECULATIVE: dict[str, Any] = {
    "lengths": (3, 0, 1, 2, 3, 1),
    "state_indices": (3, 5, 1, 0, 6, 2),
    "accepted": (1, 2, 3, 1, 3, 2),
}


def _speculative(name: str, D: int, layout: str, *sizes: Any, **options: Any) -> Case:
    kw = {**SPECULATIVE, **options}
    return _case(name, (12, D), layout, kw.pop("state_indices"), *sizes, num_spec=2, **kw)


CASES = [
    _case("SD-bf16", (4, 64), "SD", (2, 0, 5, 1)),
    _case("DS-bf16-bias", (4, 120), "DS", (2, 0, 5, 1), bias=True),
    _case("SD-fp32-W2-linear", (3, 264), "SD", (2, 4, 5), 2, torch.float32, activation=None),
    _case("DS-fp16-W3-swish", (3, 40), "DS", (2, 4, 5), 3, torch.float16, activation="swish"),
    _case("DS-fp32-state", (3, 40), "DS", (2, 4, 5), state_dtype=torch.float32, strided=True),
    _case("SD-q3", (3, 3, 40), "SD", (6, 1, 3), accepted=(1, 3, 2), num_spec=2, strided=True),
    _case("DS-q2-slot-table", (2, 2, 40), "DS", ((6, 1), (3, 2)), accepted=(2, 1), num_spec=1),
    _case("SD-q0", (2, 0, 40), "SD", (6, 1)),
    _speculative("SD-speculative", 120, "SD"),
    _speculative("DS-speculative", 120, "DS", bias=True),
    _speculative("DS-speculative-fp32-W2", 24, "DS", 2, torch.float32, index_dtype=torch.int64),
    *(
        _case(
            f"{layout}-N{N}-D12288",
            (N, 12288),
            layout,
            tuple(range(1, N + 1)),
            num_slots=N + 1,
            perf=True,
        )
        for layout in ("SD", "DS")
        for N in (1, 16, 64, 256)
    ),
]

CASES += [
    *map(dense, named(CASES, "DS-bf16-bias", "SD-q3", "DS-speculative")),
    *map(negative, named(CASES, "DS-bf16-bias", "SD-speculative")),
]
