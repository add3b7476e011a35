"""The delta rule token by token, in eager PyTorch."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.varlen import even_length, page_index


def source_slots(state_indices: Tensor, num_accepted: Tensor | None) -> Tensor:
    """The slot each sequence continues from, `[N]`, int64, from `[N]` or `[N, columns]`."""
    slots = (state_indices if state_indices.dim() == 2 else state_indices[:, None]).long()
    if num_accepted is None:
        return slots[:, 0]
    column = num_accepted.long() - 1
    return slots.gather(1, column.clamp(0, slots.shape[1] - 1)[:, None])[:, 0]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    num_accepted: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`recurrent_kda`, batched over sequences and heads, states in place; loops over the tokens of
    the longest sequence.
    """
    acc = accumulation_dtype(v)
    shape, dtype, (HV, V) = v.shape, v.dtype, v.shape[-2:]
    groups = HV // q.shape[-2]
    per_token = state_indices.dim() == 2
    slots = (state_indices if per_token else state_indices[:, None]).long()  # [N, columns]
    q, k, v, g, beta = (x.flatten(0, 1).to(acc) for x in (q, k, v, g, beta))
    if cu_seqlens is None:
        tokens = len(q) // max(len(slots), 1)
        offsets = torch.arange(len(slots) + 1, device=q.device) * tokens
    else:
        offsets = cu_seqlens.long()
    starts, lengths = offsets[:-1], offsets.diff()

    source = source_slots(state_indices, num_accepted)
    live = (source > 0) & (source < len(state)) & (lengths > 0)
    even = even_length(offsets, len(q))
    alike = even is not None and bool(live.all())  # then rows and states are slices
    pages = page_index(source) if alike else source.where(live, 0)
    S = state[pages].to(acc)  # [N, HV, V, K]
    o = torch.zeros(len(q), HV, V, dtype=acc, device=q.device)
    for j in range(max(lengths.tolist(), default=0)):
        n: Any = slice(None) if alike else (live & (lengths > j)).nonzero()[:, 0]
        row: Any = slice(j, None, even) if alike else starts[n] + j
        k_j, q_j = k[row], q[row]
        if groups > 1:
            k_j, q_j = (x.repeat_interleave(groups, dim=1) for x in (k_j, q_j))  # [n, HV, K]
        S_j = S[n] * g[row].exp()[:, :, None, :]
        delta = beta[row][..., None] * (v[row] - torch.einsum("nhvk,nhk->nhv", S_j, k_j))
        S_j = S_j + delta[..., None] * k_j[:, :, None, :]
        o[row] = scale * torch.einsum("nhvk,nhk->nhv", S_j, q_j)
        if alike:
            S = S_j  # before, it may be the pages themselves
        else:
            S[n] = S_j
        if per_token and j < slots.shape[1]:
            target = slots[n, j]
            kept = (target > 0) & (target < len(state))
            state[target[kept]] = S_j[kept].to(state.dtype)
    if not per_token and alike:
        state[pages] = S.to(state.dtype)
    elif not per_token:
        state[source[live]] = S[live].to(state.dtype)
    return o.to(dtype).reshape(shape)
