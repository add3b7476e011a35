"""The tokens before and at the end of sequences as values: what a convolution continues from and
what the next one does, with gradients of both.

States in pages are read and written by the kernels. Values are put before their sequences, which
copies x once: it is for training over parts of a sequence, where states are small.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._checks import check_device, check_dtype, check_shape

Select = Callable[[Tensor], Tensor]
Convolve = Callable[[Sequence[Tensor], Tensor | None], Sequence[Tensor]]


def check_history(
    initial_state: Tensor | None, conv_state: Tensor | None, x: Tensor, past: int,
    cu_seqlens: Tensor | None, layout: str, wanted: bool,
) -> None:  # fmt: skip
    """A history of `past` tokens before each sequence of `x [B, T, D]` or `[T, D]`, as values."""
    if conv_state is not None and (initial_state is not None or wanted):
        name = "output_final_state" if initial_state is None else "initial_state"
        raise ValueError(f"{name} must not come with conv_state, which holds both states")
    if initial_state is None:
        return
    N = len(cu_seqlens) - 1 if cu_seqlens is not None else 1 if x.dim() == 2 else x.shape[0]
    sizes = (past, x.shape[-1])
    check_dtype("initial_state", initial_state)
    check_shape("initial_state", initial_state, (N, *(sizes if layout == "SD" else sizes[::-1])))
    check_device(x=x, initial_state=initial_state)


def states_of(initial_state: Any, parts: int) -> list[Tensor | None]:
    """The state of each of one or three tensors that are convolved."""
    if initial_state is None or (parts == 1 and isinstance(initial_state, Tensor)):
        return [initial_state] * parts
    given = list(initial_state) if isinstance(initial_state, (tuple, list)) else []
    if len(given) != parts or not all(isinstance(x, Tensor) for x in given):
        kind = "a tensor" if parts == 1 else "three tensors, of q, k and v"
        raise ValueError(
            f"initial_state must be {kind}, like the other arguments, "
            f"got {type(initial_state).__name__}"
        )
    return given


def prepended(
    x: Tensor, history: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Select]:
    """Every sequence behind its history.

    Args:
        x: `[B, T, D]`.
        history: `[N, P, D]`.
        cu_seqlens: `[N + 1]` or None.

    Returns:
        The longer rows, in x's dtype, their offsets, and what selects the rows of x from `[B, T',
        ...]`. Rows past the last sequence stay there.
    """
    N, past, _ = history.shape
    history = history.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([history, x], dim=1), None, lambda y: y[:, past:]
    T = x.shape[1]
    n = torch.arange(N, device=x.device)
    before = (cu_seqlens[:-1] + n * past)[:, None] + torch.arange(past, device=x.device)
    token = torch.arange(T, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=N - 1)
    place = token + (sequence + 1) * past
    rows = x.new_zeros(T + N * past, x.shape[2])
    rows = rows.index_copy(0, before.flatten().long(), history.flatten(0, 1))
    rows = rows.index_copy(0, place, x[0])
    offsets = cu_seqlens + torch.arange(N + 1, device=x.device, dtype=cu_seqlens.dtype) * past
    return rows[None], offsets, lambda y: y[:, place]


def last_rows(
    x: Tensor, count: int, history: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:  # fmt: skip
    """The last tokens of each sequence, where it is shorter the last ones of its history before.

    Args:
        x: `[B, T, D]`.
        count: How many.
        history: `[N, count, D]`, None for zeros.
        cu_seqlens: `[N + 1]` or None.

    Returns:
        `[N, count, D]` in x's dtype, contiguous.
    """
    B, T, D = x.shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    before = x.new_zeros(N, count, D) if history is None else history.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([before, x], dim=1)[:, T:].contiguous()
    first, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = end - count + torch.arange(count, device=x.device)
    # a token before the first one is so many rows from the end of the history
    row = (token - first + count).clamp(max=count - 1)
    before = before.gather(1, row[..., None].expand_as(before).long())
    padded = F.pad(x[0], (0, 0, 0, 1))  # also a batch without tokens has a row
    return torch.where((token >= first)[..., None], padded[token.clamp(0, T)], before)


def convolved_behind(
    convolve: Convolve, xs: Sequence[Tensor], states: Sequence[Tensor | None], past: int,
    cu_seqlens: Tensor | None, layout: str, wanted: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """What a convolution of one or several tensors gives behind states that are values.

    Args:
        convolve: From the tensors and offsets to results `[B, T, ...]`.
        xs: `[B, T, D]` each.
        states: Of each, `[N, past, D]` in layout SD, `[N, D, past]` in layout DS; None for zeros.
        past: Tokens in a state.
        cu_seqlens: `[N + 1]` or None.
        layout: `"SD"` or `"DS"`.
        wanted: Whether the final states are.

    Returns:
        The results, and the final states in the layout, none if they are not wanted.
    """
    histories = [x if x is None or layout == "SD" else x.mT for x in states]
    if histories[0] is None:
        results = list(convolve(xs, cu_seqlens))
    else:
        pairs = zip(xs, histories, strict=True)
        longer = [prepended(x, y, cu_seqlens) for x, y in pairs if y is not None]
        _, offsets, select = longer[0]
        results = [select(y).contiguous() for y in convolve([x for x, *_ in longer], offsets)]
    finals = []
    for x, history in zip(xs, histories, strict=True):
        if wanted:
            final = last_rows(x, past, history, cu_seqlens)
            finals.append(final if layout == "SD" else final.mT.contiguous())
    return results, finals
