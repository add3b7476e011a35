"""The short convolution of new tokens against its state, in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.formulas import accumulation_dtype, extended_rows, short_convolution


def short_conv_update_reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    slots: Tensor,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
) -> Tensor:
    past = weight.shape[1] - 1
    flat = x.reshape(-1, x.shape[-1])
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)  # [slots, L, D]
    slots = (slots[:, 0] if slots.dim() == 2 else slots).long()
    sequences, L = slots.shape[0], state.shape[1]
    if cu_seqlens is None:
        tokens = x.shape[1] if x.dim() == 3 else 1
        offsets = torch.arange(sequences + 1, device=x.device) * tokens
    else:
        offsets = cu_seqlens.long()
    active = slots != 0
    first = torch.zeros_like(slots) if num_accepted is None else num_accepted.long() - 1
    window = first[:, None] + torch.arange(past, device=x.device)
    acc = accumulation_dtype(x)
    history = torch.where(active[:, None, None], state[slots[:, None], window].to(acc), 0.0)
    y = short_convolution(flat, history, weight, bias, activation, offsets, active)

    rows = torch.arange(L, device=x.device).expand(sequences, L)
    sequence = torch.arange(sequences, device=x.device)[:, None].expand_as(rows)
    new = extended_rows(history, flat.to(acc), offsets, sequence, rows + 1)
    lengths = offsets[1:] - offsets[:-1]
    written = (active & (lengths > 0))[:, None] & (rows < past - 1 + lengths[:, None])
    state[slots[:, None].expand_as(rows)[written], rows[written]] = new[written].to(state.dtype)
    return y.reshape(x.shape)
