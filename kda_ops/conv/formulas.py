"""The short convolution in eager PyTorch, for the references of the operators that compute it.

On a CPU long sequences are convolved where they lie. Where they are short, and on a GPU, whose
offsets nobody waits for, rows are gathered by index, for all sequences at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._gradients import records_gradient
from kda_ops._numerics import accumulation_dtype
from kda_ops.blocks import Blocks
from kda_ops.varlen import even_length, known, page_index, pages_of, sequence_offsets

SHORT = 8  # tokens: below, rows are gathered sooner than a sequence is convolved by itself


def extended_rows(
    history: Tensor, x: Tensor, starts: Tensor, sequence: Tensor, index: Tensor
) -> Tensor:
    """Rows of `concat(history[n], x[starts[n]:])`.

    Args:
        history: `[N, W - 1, D]`, what came before each sequence.
        x: `[T, D]`, the tokens of all sequences.
        starts: `[N]`, int64, the row of x where each sequence starts.
        sequence: Any shape, int64, in `[0, N)`: which n each row is taken from.
        index: The same shape, int64, not negative: which row of it. Past the end of x its last.

    Returns:
        `[*sequence.shape, D]`.
    """
    past = history.shape[1]
    x = x if x.shape[0] else x.new_zeros(1, x.shape[1])
    old = history[sequence, index.clamp(max=past - 1)]
    new = x[(starts[sequence] + index - past).clamp(0, x.shape[0] - 1)]
    return torch.where((index < past)[..., None], old, new)


def short_convolution(
    x: Tensor, history: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor, active: Tensor,
) -> Tensor:  # fmt: skip
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


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """The convolution of `x [B, T, D]` along T with zeros before it, `weight [D, W]`, activated.

    oneDNN has it for fp32 in the layout that x has, in one pass over memory.
    """
    (_, T, D), W = x.shape, weight.shape[1]
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if on_cpu and torch.backends.mkldnn.is_available():
        image = x.unsqueeze(1).permute(0, 3, 1, 2)  # [B, D, 1, T], channels last
        filters = weight.contiguous()[:, None, None]
        if activation == "silu" and _fuses(x, weight, bias):
            bias = None if bias is None else bias.contiguous()
            sizes = ([0, W - 1], [1, 1], [1, 1], D)  # padding, strides, dilation, groups
            convolve = torch.ops.mkldnn._convolution_pointwise
            y = convolve(image, filters, bias, *sizes, "swish", [], "")
            return y.permute(0, 2, 3, 1)[:, 0, :T]
        y = F.conv2d(image, filters, bias, padding=(0, W - 1), groups=D)
        y = y.permute(0, 2, 3, 1)[:, 0, :T]
        return F.silu(y) if activation == "silu" else y
    last = weight[:, W - 1]
    y = x * last if bias is None else torch.addcmul(bias, x, last)
    for back in range(1, min(W, T)):
        y[:, back:].addcmul_(x[:, : T - back], weight[:, W - 1 - back])
    return F.silu(y) if activation == "silu" else y


def _fuses(*inputs: Tensor | None) -> bool:
    """Whether oneDNN's convolution with SiLU behind it may be called: it has no gradient."""
    return not records_gradient(*inputs) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def convolved(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`x [B, T, D]` convolved behind `history [B, W - 1, D]`, None for zeros, and activated."""
    past = weight.shape[1] - 1
    kernel = (weight, bias, activation)
    if history is None:
        return depthwise(x, *kernel).contiguous()
    first = depthwise(torch.cat([history, x[:, :past]], dim=1), *kernel)[:, past:]
    if x.shape[1] <= past:
        return first.contiguous()
    y = depthwise(x, *kernel).contiguous()
    y[:, :past] = first
    return y


def conv_sequences(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None, active: Tensor | None,
) -> Tensor:  # fmt: skip
    """Depthwise causal convolution of whole sequences, each behind its history.

    Args:
        x: `[B, T, D]`, of which every row is a sequence, or with `cu_seqlens` `[1, T, D]`.
        history: `[N, W - 1, D]`, None for zeros.
        weight: `[D, W]`; the last tap meets the token itself.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        cu_seqlens: `[N + 1]` or None.
        active: `[N]`, bool, None for all. Rows of the other sequences, and rows past the last
            sequence, are not read and give zero.

    Returns:
        `[B, T, D]` in x's dtype.
    """
    offsets = sequence_offsets(x, cu_seqlens)
    N, rows, D = len(offsets) - 1, x.shape[0] * x.shape[1], x.shape[2]
    acc = accumulation_dtype(x)
    wide = (weight.to(acc), None if bias is None else bias.to(acc), activation)
    even = even_length(offsets, rows)
    if even is not None and (active is None or bool(active.all())):
        sequences = x.reshape(N, even, D).to(acc)
        return convolved(sequences, history, *wide).to(x.dtype).view(x.shape)
    flat = x.reshape(rows, D)
    if not known(offsets) or rows < SHORT * N:
        if history is None:
            history = x.new_zeros(N, weight.shape[1] - 1, D)
        if active is None:
            active = offsets.new_ones(N, dtype=torch.bool)
        y = short_convolution(flat, history, weight, bias, activation, offsets, active)
        return y.view(x.shape)
    ends = offsets.tolist()
    parts = []
    for n, read in enumerate([True] * N if active is None else active.tolist()):
        part = flat[None, ends[n] : ends[n + 1]]
        if read:
            past = None if history is None else history[n : n + 1]
            part = convolved(part.to(acc), past, *wide).to(x.dtype)
        else:
            part = torch.zeros_like(part)
        parts.append(part)
    parts.append(torch.zeros_like(flat[None, ends[-1] :]))
    return torch.cat(parts, dim=1).view(x.shape)


def conv_whole(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`conv_sequences` of `x [B, T, D]` or `[T, D]` without a history."""
    rows = x if x.dim() == 3 else x[None]
    y = conv_sequences(rows, None, weight, bias, activation, cu_seqlens, None)
    return y.view(x.shape)


def conv_whole_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, blocks: Blocks | None,
) -> Tensor:  # fmt: skip
    """`conv_whole` with a history from each sequence's slot, to which the last W - 1 rows go, and
    those before the end of each of `blocks` to its page.
    """
    rows = x if x.dim() == 3 else x[None]
    past, sequences = weight.shape[1] - 1, len(sequence_offsets(rows, cu_seqlens)) - 1
    pages, live = pages_of(state_indices, sequences, x.device)
    history = known_history(rows, past, conv_state, pages, live, has_initial_state, layout)
    y = conv_sequences(rows, history, weight, bias, activation, cu_seqlens, live)
    keep_blocks(rows, past, conv_state, live, cu_seqlens, layout, blocks)
    keep_last(rows, history, conv_state, pages, live, cu_seqlens, layout)
    return y.view(x.shape)


def known_history(
    x: Tensor, past: int, conv_state: Tensor, pages: Tensor, live: Tensor,
    has_initial_state: Tensor | None, layout: str,
) -> Tensor:  # fmt: skip
    """The `past` rows before each sequence, `[N, past, D]`: its page's, or zeros."""
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)  # [slots, L, D]
    read = live & (False if has_initial_state is None else has_initial_state)
    rows = state[page_index(pages), :past].to(accumulation_dtype(x))
    return torch.where(read[:, None, None], rows, 0.0)


def keep_last(
    x: Tensor, history: Tensor, conv_state: Tensor, pages: Tensor, live: Tensor,
    cu_seqlens: Tensor | None, layout: str,
) -> None:  # fmt: skip
    """Writes the last rows of each history and its sequence to its page, as many as the history
    has.
    """
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)
    offsets = sequence_offsets(x, cu_seqlens)
    past = history.shape[1]
    even = even_length(offsets, x.shape[0] * x.shape[1])
    if even is not None and bool(live.all()):
        last = x.reshape(len(pages), even, -1)[:, -past:]
        kept = torch.cat([history, last], dim=1)[:, -past:]
        state[page_index(pages), :past] = kept.to(state.dtype)
        return
    index = (offsets[1:] - offsets[:-1])[:, None] + torch.arange(past, device=x.device)
    sequence = torch.arange(len(pages), device=x.device)[:, None].expand_as(index)
    new = extended_rows(history, x.reshape(-1, x.shape[-1]), offsets, sequence, index)
    state[pages[live], :past] = new[live].to(state.dtype)


def keep_blocks(
    x: Tensor, past: int, conv_state: Tensor, live: Tensor, cu_seqlens: Tensor | None, layout: str,
    blocks: Blocks | None,
) -> None:  # fmt: skip
    """Writes the `past` rows before the end of each block to its page; a block is longer."""
    if blocks is None:
        return
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)
    offsets = sequence_offsets(x, cu_seqlens)
    sequence, end, page = blocks.ends(offsets, live, len(state))
    row = (offsets[sequence] + end)[:, None] + torch.arange(-past, 0, device=x.device)
    state[page, :past] = x.reshape(-1, x.shape[-1])[row].to(state.dtype)


def conv_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    state_indices: Tensor | None, num_accepted: Tensor | None, offsets: Tensor, layout: str,
) -> Tensor:  # fmt: skip
    """`short_convolution` of new tokens against their slots, which are shifted in place.

    Args:
        x: `[T, D]`.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS.
        weight: `[D, W]`.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        state_indices: `[N]` or `[N, columns]`, of which column 0 is taken, or None.
        num_accepted: `[N]` or None; looked at where the sequence has a page.
        offsets: `[N + 1]`, int64.
        layout: `"SD"` or `"DS"`.

    Returns:
        `[T, D]` in x's dtype.
    """
    past = weight.shape[1] - 1
    state = conv_state if layout == "SD" else conv_state.transpose(1, 2)  # [slots, L, D]
    if state_indices is not None and state_indices.dim() == 2:
        state_indices = state_indices[:, 0]
    sequences, L = len(offsets) - 1, state.shape[1]
    pages, active = pages_of(state_indices, sequences, x.device)
    if num_accepted is None:
        history = state[page_index(pages), :past]
    else:
        first = torch.where(active, num_accepted.long() - 1, 0)
        window = first[:, None] + torch.arange(past, device=x.device)
        history = state[pages[:, None], window]
    acc = accumulation_dtype(x)
    history = torch.where(active[:, None, None], history.to(acc), 0.0)
    tokens = even_length(offsets, len(x))
    if tokens is not None and bool(active.all()):
        rows = x.reshape(sequences, tokens, -1)
        y = conv_sequences(rows, history, weight, bias, activation, None, None)
        new = torch.cat([history, rows], dim=1)[:, 1:]
        state[page_index(pages), : new.shape[1]] = new.to(state.dtype)
        return y.view(x.shape)
    y = short_convolution(x, history, weight, bias, activation, offsets, active)

    rows = torch.arange(L, device=x.device).expand(sequences, L)
    sequence = torch.arange(sequences, device=x.device)[:, None].expand_as(rows)
    new = extended_rows(history, x.to(acc), offsets, sequence, rows + 1)
    lengths = offsets[1:] - offsets[:-1]
    written = (active & (lengths > 0))[:, None] & (rows < past - 1 + lengths[:, None])
    state[pages[:, None].expand_as(rows)[written], rows[written]] = new[written].to(state.dtype)
    return y
