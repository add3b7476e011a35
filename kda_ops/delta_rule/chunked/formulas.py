"""Chunked KDA in eager PyTorch, for the references of the operators that compute it.

Everything is batched over all chunks and heads; only the state's recurrence loops over the chunks
of a sequence. Tiles are `[chunks, HV, 64, ...]`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.states import Raw, identity_states
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.gating.formulas import cumulative_gate
from kda_ops.norm.formulas import l2_normalized
from kda_ops.varlen import pages_of, prepare_chunk_indices, real_rows


def used_inputs(
    q: Tensor, k: Tensor, raw_gate: Tensor, raw_beta: Tensor, raw: Raw, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The q, k, cumulative gate and beta of `chunk_kda`, without rounding between the parts."""
    if raw.qk_norm_eps is not None:
        q, k = (l2_normalized(real_rows(y, cu_seqlens, 1.0), raw.qk_norm_eps) for y in (q, k))
    gate = (raw_gate, *raw[:3], CHUNK, cu_seqlens, chunk_indices)
    beta = real_rows(raw_beta, cu_seqlens, 0.0).to(accumulation_dtype(raw_beta))
    return q, k, cumulative_gate(*gate, to_be_seen=False), raw.beta_scale * torch.sigmoid(beta)


def chunked_kda(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunk_kda` from initial to final states; the output has the dtype of v."""
    acc = accumulation_dtype(q)
    offsets = _offsets(q, cu_seqlens)
    if initial_state is None:
        S = torch.zeros(
            len(offsets) - 1, v.shape[2], q.shape[3], v.shape[3], dtype=acc, device=q.device
        )
    else:
        S = initial_state.to(acc).transpose(-1, -2)
    o, S = _forward(q, k, v, G, beta, scale, S, offsets)
    dtype = acc if initial_state is None else initial_state.dtype
    if not output_final_state:
        return o, torch.empty(0, dtype=dtype, device=q.device)
    return o, S.transpose(-1, -2).to(dtype).clone(memory_format=torch.contiguous_format)


def chunked_kda_affine(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, entered: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`chunk_kda` as an affine function of the state before it: what `chunk_kda_gated_affine`
    returns. K more rows of the state start from the identity, with v = 0.
    """
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    (HV, V), K, acc = v.shape[2:], q.shape[3], accumulation_dtype(q)
    if initial_state is None:
        initial_state = torch.zeros(N, HV, V, K, dtype=acc, device=q.device)
    identity = identity_states(N, HV, K, entered, acc, q.device)
    initial = torch.cat([initial_state.to(acc), identity], -2)
    rows, states = chunked_kda(
        q, k, F.pad(v, (0, K)), G, beta, scale, initial, True, cu_seqlens
    )  # fmt: skip
    return split_affine(rows, states, V)


def split_affine(rows: Tensor, states: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, what is read of the state before it, the final state and the transition, from
    rows `[B, T, HV, V + K]` and states `[N, HV, V + K, K]`.
    """
    found = (rows[..., :V], rows[..., V:], states[..., :V, :], states[..., V:, :])
    o, reads, final, transition = (x.clone(memory_format=torch.contiguous_format) for x in found)
    return o, reads, final, transition


def chunked_kda_state(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, scale: float, state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    state_layout: str, blocks: Blocks | None,
) -> Tensor:  # fmt: skip
    """`chunk_kda` on paged states, in place; the output has the dtype of v."""
    offsets = _offsets(q, cu_seqlens)
    pages, live = pages_of(state_indices, len(offsets) - 1, q.device)
    read = live if has_initial_state is None else live & has_initial_state
    k_first = v_first(state, state_layout).transpose(-1, -2)
    S = torch.where(read[:, None, None, None], k_first[pages].to(accumulation_dtype(q)), 0)
    ends = None if blocks is None else blocks.ends(offsets, live, len(state))

    def after_chunk(c: int, S: Tensor) -> None:
        if ends is not None:
            sequence, end, page = ends
            now = end == (c + 1) * CHUNK
            k_first[page[now]] = S[sequence[now]].to(state.dtype)

    o, S = _forward(q, k, v, G, beta, scale, S, offsets, after_chunk)
    k_first[pages[live]] = S[live].to(state.dtype)
    tokens = torch.repeat_interleave(live, offsets[1:] - offsets[:-1])  # [tokens of sequences]
    dead = torch.nn.functional.pad(~tokens, (0, q.shape[0] * q.shape[1] - len(tokens)), value=True)
    return o.masked_fill(dead.view(*q.shape[:2], 1, 1), 0)


def _offsets(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[N + 1]` offsets of the sequences in the flattened tokens; without `cu_seqlens` every batch
    row is a sequence.
    """
    if cu_seqlens is not None:
        return cu_seqlens.long()
    return torch.arange(q.shape[0] + 1, device=q.device) * q.shape[1]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, scale: float, S: Tensor,
    offsets: Tensor, after_chunk: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs `[B, T, HV, V]` and final states from the initial ones, `S [N, HV, K, V]`.

    `after_chunk` is called with each chunk's number and the states after it.
    """
    acc = accumulation_dtype(q)
    B, T, H, _ = q.shape
    HV, dtype = v.shape[2], v.dtype
    table = prepare_chunk_indices(offsets, B * T).long()
    sequence, chunk = table[table[:, 0] >= 0].unbind(1)
    lengths = offsets[1:] - offsets[:-1]
    counts = (lengths + (CHUNK - 1)) // CHUNK
    first_chunk = counts.cumsum(0) - counts

    end = offsets[1:][sequence][:, None]
    first = (offsets[sequence] + chunk * CHUNK)[:, None]
    row = first + torch.arange(CHUNK, device=q.device)  # [chunks, 64]
    real = row < end
    # padding lanes repeat the last token's G, for exponents <= 0, and are otherwise zero
    row = torch.minimum(row, end - 1)

    def tiles(x: Tensor, heads: int) -> Tensor:
        x = x.flatten(0, 1)[row].to(acc).transpose(1, 2)
        return x.repeat_interleave(HV // heads, dim=1) if heads != HV else x

    def masked(x: Tensor, heads: int) -> Tensor:
        return torch.where(real[:, None, :, None], tiles(x, heads), 0)

    G = tiles(G, HV)
    q, k, v = masked(q, H) * scale, masked(k, H), masked(v, HV)
    beta = masked(beta.unsqueeze(-1), HV)
    attention, inverse = _within_chunks(q, k, G, beta)
    decay = torch.exp2(G)
    u = inverse @ (beta * v)
    w = inverse @ (beta * k * decay)
    qg = q * decay
    last = G[..., -1:, :]
    kg = (k * torch.exp2(last - G)).transpose(-1, -2)
    last = torch.exp2(last).transpose(-1, -2)  # [chunks, HV, K, 1]

    at, outputs = [], []
    for c in range(int(counts.max()) if len(counts) else 0):
        running = (counts > c).nonzero().squeeze(1)
        i = first_chunk[running] + c
        before = S[running]
        vn = u[i] - w[i] @ before
        outputs.append(qg[i] @ before + attention[i] @ vn)
        S = S.index_copy(0, running, last[i] * before + kg[i] @ vn)
        at.append(i)
        if after_chunk is not None:
            after_chunk(c, S)
    o = torch.zeros(B * T, HV, v.shape[3], dtype=acc, device=q.device)
    if outputs:
        i = torch.cat(at)
        o = o.index_copy(0, row[i][real[i]], torch.cat(outputs).transpose(1, 2)[real[i]])
    return o.to(dtype).view(B, T, HV, v.shape[3]), S


def _within_chunks(q: Tensor, k: Tensor, G: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The two 64 x 64 matrices of every chunk: `Aqk` (including q's scale) and `Ainv = (I +
    L)^-1`.

    Both are built from blocks of s = 1, 2, ..., 32 rows. Two neighboring blocks are joined through
    the last row a of the left one: for i right and j left of it, 2^(G_i - G_j) = 2^(G_i - G_a)
    2^(G_a - G_j), and both exponents are <= 0 for any gate. The inverse of a joined block is
    [[X0, 0], [-X1 L X0, X1]].
    """
    attention = (q * k).sum(-1)[..., None, None]  # [chunks, HV, 64 / s, s, s] at block size s
    inverse = torch.ones_like(attention)
    s = 1
    while s < CHUNK:
        shape = (CHUNK // (2 * s), 2, s)
        G_left, G_right = G.unflatten(2, shape).unbind(3)
        anchor = G_left[..., -1:, :]
        k_left, k_right = k.unflatten(2, shape).unbind(3)
        columns = (k_left * torch.exp2(anchor - G_left)).transpose(-1, -2)
        decay = torch.exp2(G_right - anchor)
        cross = (q.unflatten(2, shape)[:, :, :, 1] * decay) @ columns
        L = (beta.unflatten(2, shape)[:, :, :, 1] * k_right * decay) @ columns
        X0, X1 = inverse.unflatten(2, shape[:2]).unbind(3)
        A0, A1 = attention.unflatten(2, shape[:2]).unbind(3)
        attention = _join(A0, cross, A1)
        inverse = _join(X0, -(X1 @ (L @ X0)), X1)
        s *= 2
    return attention.squeeze(2), inverse.squeeze(2)


def _join(upper: Tensor, cross: Tensor, lower: Tensor) -> Tensor:
    """[[upper, 0], [cross, lower]]."""
    top = torch.cat([upper, torch.zeros_like(cross)], dim=-1)
    return torch.cat([top, torch.cat([cross, lower], dim=-1)], dim=-2)
