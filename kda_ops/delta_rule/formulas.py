"""The delta rule token by token, in eager PyTorch."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.varlen import even_length, page_index, pages_of


def source_pages(
    state_indices: Tensor | None, num_accepted: Tensor | None, sequences: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`pages_of` what each sequence continues from, of slots `[N]` or `[N, columns]`."""
    if state_indices is None or state_indices.dim() == 1:
        return pages_of(state_indices, sequences, device)
    if num_accepted is None:
        return pages_of(state_indices[:, 0], sequences, device)
    column = (num_accepted.long() - 1).clamp(0, state_indices.shape[1] - 1)
    slots = state_indices.gather(1, column[:, None])[:, 0]
    return pages_of(slots, sequences, device)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
    state_indices: Tensor | None, num_accepted: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, state_layout: str,
) -> Tensor:  # fmt: skip
    """`recurrent_kda`, batched over sequences and heads, states in place; loops over the tokens of
    the longest sequence.
    """
    acc = accumulation_dtype(v)
    shape, dtype, (HV, V) = v.shape, v.dtype, v.shape[-2:]
    groups = HV // q.shape[-2]
    state = v_first(state, state_layout)
    columns = 0  # slots of tokens
    if state_indices is not None and state_indices.dim() == 2:
        columns = state_indices.shape[1]
    if cu_seqlens is None:
        offsets = torch.arange(len(q) + 1, device=q.device) * q.shape[1]
    else:
        offsets = cu_seqlens.long()
    q, k, v, g, beta = (x.flatten(0, 1).to(acc) for x in (q, k, v, g, beta))
    starts, lengths = offsets[:-1], offsets.diff()

    source, live = source_pages(state_indices, num_accepted, len(starts), q.device)
    live = live & (source < len(state)) & (lengths > 0)
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
        if state_indices is not None and j < columns:
            target = state_indices[n, j].long()
            kept = (target > 0) & (target < len(state))
            state[target[kept]] = S_j[kept].to(state.dtype)
    if not columns and alike:
        state[pages] = S.to(state.dtype)
    elif not columns:
        state[source[live]] = S[live].to(state.dtype)
    return o.to(dtype).reshape(shape)
