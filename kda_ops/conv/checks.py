"""Checks of the arguments of a short convolution."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._checks import (
    INTEGERS,
    check_cu_seqlens_shape,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_page_values,
    check_pages,
    check_rank,
    check_shape,
)
from kda_ops._numerics import CHUNK
from kda_ops.blocks import Blocks, check_block_values, check_blocks
from kda_ops.varlen import sequence_offsets


def resolve_activation(activation: str | None) -> str | None:
    """`"silu"` or None."""
    if activation not in ("silu", "swish", None):
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")
    return None if activation is None else "silu"


def taps_of(weight: Any) -> Any:
    """A weight `[D, W]`, of itself or of `nn.Conv1d`'s `[D, 1, W]`."""
    given = isinstance(weight, Tensor) and weight.dim() == 3 and weight.shape[1] == 1
    return weight.squeeze(1) if given else weight


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The arguments of a depthwise convolution over `x [..., D]`."""
    check_dtype("x", x)
    if x.shape[-1] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    check_rank("weight", weight, 2)
    if weight.shape[1] < 2:
        raise ValueError(
            f"weight must have shape [D, W] with W at least 2, got {tuple(weight.shape)}"
        )
    check_shape("weight", weight, (x.shape[-1], weight.shape[1]))
    check_dtype("weight", weight)
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))
        check_dtype("bias", bias)


def check_conv_state(conv_state: Tensor, layout: str, D: int, W: int) -> None:
    """A convolution state of D channels that holds at least the W - 1 rows of a history."""
    check_dtype("conv_state", conv_state)
    check_rank("conv_state", conv_state, 3)
    dims, L = (conv_state.shape[2], conv_state.shape[1]) if layout == "SD" else conv_state.shape[1:]
    if dims != D or L < W - 1:
        axes = f"[slots, L, {D}]" if layout == "SD" else f"[slots, {D}, L]"
        raise ValueError(
            f"conv_state must have shape {axes} with L at least {W - 1} in layout {layout}, "
            f"got {tuple(conv_state.shape)}"
        )


def check_conv_sequences(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str,
) -> None:  # fmt: skip
    """The arguments of a convolution of whole sequences `x [B, T, D]` or `[T, D]`, with or without
    a state.
    """
    check_conv(x, weight, bias)
    sequences = 1 if x.dim() == 2 else x.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens_shape(cu_seqlens)
        if sequences != 1:
            raise ValueError(f"x must have batch size 1 with cu_seqlens, got {sequences}")
        sequences = cu_seqlens.shape[0] - 1
    if conv_state is None:
        for name, value in (
            ("state_indices", state_indices),
            ("has_initial_state", has_initial_state),
        ):
            if value is not None:
                raise ValueError(f"{name} must come with conv_state, got {name} alone")
    else:
        check_conv_state(conv_state, layout, x.shape[-1], weight.shape[1])
        check_pages("conv_state", conv_state, state_indices, sequences)
        if state_indices is not None:
            check_dtype("state_indices", state_indices, INTEGERS)
            check_shape("state_indices", state_indices, (sequences,))
    if has_initial_state is not None:
        check_dtype("has_initial_state", has_initial_state, (torch.bool,))
        check_shape("has_initial_state", has_initial_state, (sequences,))
    check_device(
        x=x, weight=weight, bias=bias, conv_state=conv_state, state_indices=state_indices,
        has_initial_state=has_initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def state_channels(x: Any, conv_state: Any) -> tuple[Tensor | None, int]:
    """A convolution state and its channels, to infer an unknown layout; those of q if q, k and v
    are unpacked.
    """
    if isinstance(x, (tuple, list)) and isinstance(conv_state, (tuple, list)):
        x, conv_state = x[0], conv_state[0]
    known = isinstance(x, Tensor) and isinstance(conv_state, Tensor) and x.dim() > 0
    return (conv_state, x.shape[-1]) if known else (None, 0)


def conv_parts(
    x: Any, weight: Any, bias: Any, conv_state: Any, layout: str
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """`(x, weight, bias, conv_state)` of packed q | k | v, or of each of q, k and v if every
    argument is three tensors. Every weight is `[D, W]`, see `taps_of`.

    Checks what a kernel assumes to be the same for q, k and v: dtypes, tokens of the inputs, taps
    of the weights, and slots, rows and channel strides of the states.
    """
    given = {"x": x, "weight": weight, "bias": bias, "conv_state": conv_state}
    if not any(isinstance(value, (tuple, list)) for value in given.values()):
        return [(x, taps_of(weight), bias, conv_state)]
    if isinstance(weight, (tuple, list)):
        given["weight"] = tuple(taps_of(part) for part in weight)
    for name, value in given.items():
        if value is None and name in ("bias", "conv_state"):
            given[name] = (None, None, None)
        elif not isinstance(value, (tuple, list)) or len(value) != 3:
            raise ValueError(
                f"{name} must be three tensors, of q, k and v, like the other arguments, "
                f"got {type(value).__name__}"
            )
        elif not all(isinstance(part, Tensor) for part in value):
            kinds = ", ".join(type(part).__name__ for part in value)
            raise ValueError(f"{name} must be three tensors, got {kinds}")
        else:
            for part in value[1:]:
                check_rank(name, part, value[0].dim())
                check_dtype(name, part, (value[0].dtype,))
            check_device(**{f"{name} of {y}": part for y, part in zip("qkv", value, strict=True)})
    check_rank("x", x[0], 2, 3)
    weights = given["weight"]
    check_rank("weight", weights[0], 2)
    for part in x[1:]:
        check_shape("x", part, (*x[0].shape[:-1], part.shape[-1]))
    for part in weights[1:]:
        check_shape("weight", part, (part.shape[0], *weights[0].shape[1:]))
    if conv_state is not None:
        rows, dim = (1, 2) if layout == "SD" else (2, 1)
        first = conv_state[0]
        check_rank("conv_state", first, 3)
        for part in conv_state[1:]:
            if (part.shape[0], part.shape[rows]) != (first.shape[0], first.shape[rows]):
                raise ValueError(
                    f"conv_state must have as many slots and rows for q, k and v, "
                    f"got {tuple(first.shape)} and {tuple(part.shape)} in layout {layout}"
                )
            if part.stride(dim) != first.stride(dim):
                raise ValueError(
                    f"conv_state must have one stride along the channels of q, k and v, "
                    f"got {first.stride(dim)} and {part.stride(dim)}"
                )
    return list(zip(*given.values(), strict=True))


def check_conv_blocks(
    parts: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], cu_seqlens: Tensor | None,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int | None,
) -> None:  # fmt: skip
    """The block boundaries of a convolution of whole sequences, of `conv_parts`."""
    x, weight, _, conv_state = parts[0]
    sequences = 1 if x.dim() == 2 else x.shape[0]
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    check_blocks("conv_state", conv_state, sequences, block_table, context_lens, block_tokens)
    if block_table is not None and weight.shape[1] > CHUNK + 1:
        raise ValueError(
            f"weight must have at most {CHUNK + 1} taps with block_table, got {weight.shape[1]}"
        )


def check_conv_values(
    x: Tensor, cu_seqlens: Tensor | None, conv_state: Tensor | None, state_indices: Tensor | None,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """Values of the offsets, slots and blocks of a convolution of whole sequences."""
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x.shape[-2])
    if conv_state is not None:
        check_page_values(conv_state, state_indices)
        offsets = sequence_offsets(x, cu_seqlens)
        check_block_values(conv_state.shape[0], state_indices, offsets, blocks)
