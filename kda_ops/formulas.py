"""Formulas that more than one operator's reference uses, in eager PyTorch.

Everything accumulates in fp32, or in fp64 when the input is fp64: that is how the oracle is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
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


def extended_rows(
    history: Tensor, x: Tensor, starts: Tensor, sequence: Tensor, index: Tensor
) -> Tensor:
    """Rows of `concat(history[n], x[starts[n]:])`.

    Args:
        history: `[N, W - 1, D]`, what came before each sequence.
        x: `[T, D]`, the tokens of all sequences.
        starts: `[N]`, int64, the row of x where each sequence starts.
        sequence: Any shape, int64, in `[0, N)`: which n each row is taken from.
        index: The same shape, int64, not negative: which row of it. Rows past the end of x are 0.

    Returns:
        `[*sequence.shape, D]`.
    """
    past = history.shape[1]
    x = F.pad(x, (0, 0, 0, 1))
    old = history[sequence, index.clamp(max=past - 1)]
    new = x[(starts[sequence] + index - past).clamp(0, x.shape[0] - 1)]
    return torch.where((index < past)[..., None], old, new)


def short_convolution(
    x: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor,
    active: Tensor,
) -> Tensor:
    """Depthwise causal convolution of each sequence over `concat(history[n], x[start:end])`.

    Args:
        x: `[T, D]`.
        history: `[N, W - 1, D]`.
        weight: `[D, W]`; the last tap meets the token itself.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        cu_seqlens: `[N + 1]`, int64.
        active: `[N]`, bool. Rows of the other sequences, and rows past the last sequence, are not
            read and give zero.

    Returns:
        `[T, D]` in x's dtype.
    """
    acc = accumulation_dtype(x)
    rows = torch.arange(x.shape[0], device=x.device)
    # N past the last sequence
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    read = F.pad(active, (0, 1))[sequence][:, None]
    position = rows - cu_seqlens[sequence]
    history = F.pad(history.to(acc), (0, 0, 0, 0, 0, 1))
    x_read = torch.where(read, x.to(acc), 0.0)
    y = 0.0 if bias is None else bias.to(acc)
    for tap, w in enumerate(weight.to(acc).unbind(1)):
        y = y + w * extended_rows(history, x_read, cu_seqlens, sequence, position + tap)
    if activation == "silu":
        y = F.silu(y)
    return torch.where(read, y, 0.0).to(x.dtype)


def sequence_offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[N + 1]`, int64: `cu_seqlens`, or those of the equally long sequences of a dense batch."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    sequences = x.shape[0] if x.dim() == 3 else 1
    return torch.arange(sequences + 1, device=x.device) * x.shape[-2]


def packed_bias(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> Tensor | None:
    """The biases of q, k and v as one."""
    return None if q is None or k is None or v is None else torch.cat([q, k, v])


@contextmanager
def packed_state(states: tuple[Tensor, Tensor, Tensor], layout: str) -> Iterator[Tensor]:
    """The convolution states of q, k and v as one; what is written to it is theirs afterwards."""
    dim = 2 if layout == "SD" else 1
    packed = torch.cat(states, dim=dim)
    yield packed
    for state, part in zip(states, packed.split([x.shape[dim] for x in states], dim), strict=True):
        state.copy_(part)


def conv_whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`short_convolution` of whole sequences `x [..., T, D]` that have no history."""
    offsets = sequence_offsets(x, cu_seqlens)
    sequences, W = offsets.shape[0] - 1, weight.shape[1]
    history = x.new_zeros(sequences, W - 1, x.shape[-1])
    active = torch.ones(sequences, dtype=torch.bool, device=x.device)
    flat = x.reshape(-1, x.shape[-1])
    y = short_convolution(flat, history, weight, bias, activation, offsets, active)
    return y.reshape(x.shape)


def conv_whole_state(
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
    """`conv_whole` with a history from each sequence's slot, to which the last W - 1 rows go."""
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


def conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    slots: Tensor,
    num_accepted: Tensor | None,
    offsets: Tensor,
    layout: str,
) -> Tensor:
    """`short_convolution` of new tokens against their slots, which are shifted in place.

    Args:
        x: `[T, D]`.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS.
        weight: `[D, W]`.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        slots: `[N]` or `[N, columns]`, of which column 0 is taken.
        num_accepted: `[N]` or None; looked at where the slot is not 0.
        offsets: `[N + 1]`, int64.
        layout: `"SD"` or `"DS"`.

    Returns:
        `[T, D]` in x's dtype.
    """
    past = weight.shape[1] - 1
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)  # [slots, L, D]
    slots = (slots[:, 0] if slots.dim() == 2 else slots).long()
    sequences, L = slots.shape[0], state.shape[1]
    active = slots != 0
    first = torch.zeros_like(slots)
    if num_accepted is not None:
        first = torch.where(active, num_accepted.long() - 1, 0)
    window = first[:, None] + torch.arange(past, device=x.device)
    acc = accumulation_dtype(x)
    history = torch.where(active[:, None, None], state[slots[:, None], window].to(acc), 0.0)
    y = short_convolution(x, history, weight, bias, activation, offsets, active)

    rows = torch.arange(L, device=x.device).expand(sequences, L)
    sequence = torch.arange(sequences, device=x.device)[:, None].expand_as(rows)
    new = extended_rows(history, x.to(acc), offsets, sequence, rows + 1)
    lengths = offsets[1:] - offsets[:-1]
    written = (active & (lengths > 0))[:, None] & (rows < past - 1 + lengths[:, None])
    state[slots[:, None].expand_as(rows)[written], rows[written]] = new[written].to(state.dtype)
    return y


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
        starts = torch.arange(len(slots), device=q.device) * tokens
        lengths = torch.full_like(starts, tokens)
    else:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()

    source = source_slots(state_indices, num_accepted)
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
