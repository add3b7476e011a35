"""Formulas that more than one operator's reference uses, in eager PyTorch.

Everything accumulates in fp32, or in fp64 when the input is fp64: that is how the oracle is made.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 64
RCP_LN2 = 1.4426950408889634


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16, bf16 and fp32; fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def chunk_local_cumsum(
    g: Tensor, chunk_size: int, cu_seqlens: Tensor | None, chunks: Tensor | None
) -> Tensor:
    """Inclusive prefix sum of `g [B, T, ...]` along T that restarts with every chunk, in g's dtype.

    Each chunk is summed by itself: a difference of sums over the whole length would lose the small
    terms. With `cu_seqlens` the chunks are those of the chunk table, and rows that belong to no
    sequence are zero.
    """
    B, T = g.shape[:2]
    if cu_seqlens is None:
        rows = -(-T // chunk_size)
        padding = g.new_zeros(B, rows * chunk_size - T, *g.shape[2:])
        sums = torch.cat([g, padding], 1).unflatten(1, (rows, chunk_size)).cumsum(2)
        return sums.flatten(1, 2)[:, :T].contiguous()
    token = chunk_tokens(cu_seqlens, chunks, chunk_size, T)
    padded = torch.cat([g[0], g.new_zeros(1, *g.shape[2:])])
    sums = padded[token].cumsum(1)
    return (
        torch.zeros_like(padded).index_copy(0, token.flatten(), sums.flatten(0, 1))[:T].unsqueeze(0)
    )


def chunk_tokens(cu_seqlens: Tensor, chunks: Tensor, chunk_size: int, total_tokens: int) -> Tensor:
    """The token at each place of each row of a chunk table, `[rows, chunk_size]`.

    `total_tokens` stands where there is none.
    """
    sequence, chunk = chunks.to(torch.int64).unbind(1)
    real = sequence >= 0
    place = torch.arange(chunk_size, device=chunks.device)
    first = cu_seqlens[torch.where(real, sequence, 0)] + chunk * chunk_size
    last = cu_seqlens[torch.where(real, sequence + 1, 0)]
    token = first[:, None] + place
    return torch.where(real[:, None] & (token < last[:, None]), token, total_tokens)


def real_rows(x: Tensor, cu_seqlens: Tensor | None, fill: float) -> Tensor:
    """`x [B, T, ...]` with `fill` in the rows past the last sequence.

    What is computed of padding is discarded, but its derivatives would be NaN where it holds NaN.
    """
    if cu_seqlens is None:
        return x
    token = torch.arange(x.shape[1], device=x.device).view(-1, *(1,) * (x.dim() - 2))
    return torch.where(token < cu_seqlens[-1], x, fill)


def sequence_offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[N + 1]`, int64: `cu_seqlens`, or those of the equally long sequences of a dense batch."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    sequences = x.shape[0] if x.dim() == 3 else 1
    return torch.arange(sequences + 1, device=x.device) * x.shape[-2]


def l2_normalized(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)


def gated_rms_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate)` over the last axis, in the accumulation
    dtype.
    """
    acc = accumulation_dtype(o)
    wide = o.to(acc)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y * weight.to(acc) * torch.sigmoid(gate.to(acc))


def source_slots(state_indices: Tensor, num_accepted: Tensor | None) -> Tensor:
    """The slot that each sequence continues from, `[N]`, int64, from `[N]` or `[N, columns]`."""
    slots = (state_indices if state_indices.dim() == 2 else state_indices[:, None]).long()
    if num_accepted is None:
        return slots[:, 0]
    column = num_accepted.long() - 1
    return slots.gather(1, column.clamp(0, slots.shape[1] - 1)[:, None])[:, 0]


def known(x: Tensor) -> bool:
    """Whether values can be read: traced tensors have none, and nobody waits for those of a GPU."""
    return type(x) is Tensor and x.device.type == "cpu"


def even_length(offsets: Tensor, rows: int) -> int | None:
    """How many tokens each sequence has, where all have as many, fill all rows, and are `known`."""
    sequences = len(offsets) - 1
    if not known(offsets) or rows == 0 or sequences == 0:
        return None
    tokens, rest = divmod(rows, sequences)
    if rest or tokens == 0:
        return None
    return tokens if offsets.tolist() == [*range(0, rows + 1, tokens)] else None


def page_index(slots: Tensor) -> Any:
    """What to index pages with for `slots [N]`, int64: a slice where they are `known` to follow one
    another, which gathers nothing.
    """
    if known(slots) and len(slots):
        first, *rest = slots.tolist()
        if first >= 0 and rest == [*range(first + 1, first + len(slots))]:
            return slice(first, first + len(slots))
    return slots


def recurrence(
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
    """`recurrent_kda` for all sequences and heads at once, states in place.

    The loop is over the tokens of the longest sequence.
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
