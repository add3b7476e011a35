"""The KDA recurrence token by token, in eager PyTorch: definition, CPU implementation, oracle."""

import torch
from torch import Tensor

from kda_ops.formulas import accumulation_dtype


def recurrent_kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_accepted: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """All sequences and heads at once; the loop is over the tokens of the longest sequence."""
    acc = accumulation_dtype(v)
    shape, dtype, (HV, V) = v.shape, v.dtype, v.shape[-2:]
    groups = HV // q.shape[-2]
    per_token = state_indices.dim() == 2
    slots = (state_indices if per_token else state_indices[:, None]).long()  # [N, columns]
    q, k, v, g, beta = (x.flatten(0, 1).to(acc) for x in (q, k, v, g, beta))
    if cu_seqlens is None:
        tokens = len(q) // max(len(slots), 1)
        starts = torch.arange(len(slots), device=q.device) * tokens
        lengths = torch.full_like(starts, tokens)
    else:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()

    column = torch.zeros_like(starts) if num_accepted is None else num_accepted.long() - 1
    source = slots.gather(1, column.clamp(0, slots.shape[1] - 1)[:, None])[:, 0]
    live = (source > 0) & (source < len(state)) & (lengths > 0)
    S = state[source.where(live, 0)].to(acc)  # [N, HV, V, K]
    o = torch.zeros(len(q), HV, V, dtype=acc, device=q.device)
    for j in range(max(lengths.tolist(), default=0)):
        n = (live & (lengths > j)).nonzero()[:, 0]
        row = starts[n] + j
        k_j = k[row].repeat_interleave(groups, dim=1)  # [n, HV, K]
        q_j = q[row].repeat_interleave(groups, dim=1)
        S_j = S[n] * g[row].exp()[:, :, None, :]
        delta = beta[row][..., None] * (v[row] - torch.einsum("nhvk,nhk->nhv", S_j, k_j))
        S_j = S_j + delta[..., None] * k_j[:, :, None, :]
        o[row] = scale * torch.einsum("nhvk,nhk->nhv", S_j, q_j)
        S[n] = S_j
        if per_token and j < slots.shape[1]:
            target = slots[n, j]
            kept = (target > 0) & (target < len(state))
            state[target[kept]] = S_j[kept].to(state.dtype)
    if not per_token:
        state[source[live]] = S[live].to(state.dtype)
    return o.to(dtype).reshape(shape)
