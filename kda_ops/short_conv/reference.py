"""The short convolution of whole sequences in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.formulas import accumulation_dtype, extended_rows, short_convolution


def sequence_offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[N + 1]`, int64: `cu_seqlens`, or those of the equally long sequences of a dense batch."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    sequences = x.shape[0] if x.dim() == 3 else 1
    return torch.arange(sequences + 1, device=x.device) * x.shape[-2]


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    offsets = sequence_offsets(x, cu_seqlens)
    sequences, W = offsets.shape[0] - 1, weight.shape[1]
    history = x.new_zeros(sequences, W - 1, x.shape[-1])
    active = torch.ones(sequences, dtype=torch.bool, device=x.device)
    flat = x.reshape(-1, x.shape[-1])
    y = short_convolution(flat, history, weight, bias, activation, offsets, active)
    return y.reshape(x.shape)


def short_conv_state_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state: Tensor,
    slots: Tensor,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
) -> Tensor:
    offsets = sequence_offsets(x, cu_seqlens)
    past = weight.shape[1] - 1
    flat = x.reshape(-1, x.shape[-1])
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)  # [slots, L, D]
    slots = slots.long()
    active = slots != 0
    known = active & (False if has_initial_state is None else has_initial_state)
    acc = accumulation_dtype(x)
    history = torch.where(known[:, None, None], state[slots, :past].to(acc), 0.0)
    y = short_convolution(flat, history, weight, bias, activation, offsets, active)
    lengths = offsets[1:] - offsets[:-1]
    last = lengths[:, None] + torch.arange(past, device=x.device)
    sequence = torch.arange(len(slots), device=x.device)[:, None].expand_as(last)
    new = extended_rows(history, flat.to(acc), offsets, sequence, last)
    state[slots[active], :past] = new[active].to(state.dtype)
    return y.reshape(x.shape)
