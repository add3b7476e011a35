"""The chunks of a batch: for a variable-length one, the table of each program's sequence and its
chunk of that sequence.
"""

from typing import Any

import torch
from torch import Tensor

from kda_ops._checks import check_cu_seqlens_shape, check_cu_seqlens_values, check_integer
from kda_ops._numerics import CHUNK

EMPTY = -1


def prepare_chunk_indices(cu_seqlens: Tensor, total_tokens: int, chunk_size: int = CHUNK) -> Tensor:
    """Maps chunk programs to sequences, on the device of `cu_seqlens` and without synchronizing
    with it.

    Compute it once per batch and pass it to every operator and layer that takes `chunk_indices`. It
    consists of ordinary tensor operations: it compiles, and can be captured in a CUDA graph and
    replayed with other `cu_seqlens` of the same length.

    Args:
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; first 0,
            non-decreasing, last at most `total_tokens`.
        total_tokens: T, the number of rows that `cu_seqlens` indexes, padding included.
        chunk_size: Tokens per chunk.

    Returns:
        `[T // chunk_size + N, 2]`, int32: (sequence, chunk of that sequence), in order. That many
        rows always suffice; unused rows hold `(-1, -1)`, and a program that reads one returns at
        once.

    Raises:
        ValueError: Wrong shape or dtype, a negative `total_tokens` or a `chunk_size` below 1.
    """
    check_cu_seqlens_shape(cu_seqlens)
    check_integer("total_tokens", total_tokens)
    check_integer("chunk_size", chunk_size)
    if total_tokens < 0:
        raise ValueError(f"total_tokens must not be negative, got {total_tokens}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    sequences = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    ends = ((lengths + (chunk_size - 1)) // chunk_size).cumsum(0)
    # never empty, even without sequences: searchsorted in nothing does not compile for a GPU
    starts = torch.nn.functional.pad(ends, (1, 0))
    row = torch.arange(total_tokens // chunk_size + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    real = sequence < sequences
    chunk = row - starts[sequence]
    table = torch.stack([sequence, chunk], dim=1)
    return torch.where(real[:, None], table, EMPTY).to(torch.int32)


def chunk_tokens(
    cu_seqlens: Tensor, chunk_indices: Tensor, chunk_size: int, total_tokens: int
) -> Tensor:
    """The token at each position of each row of a chunk table, `[rows, chunk_size]`; `total_tokens`
    where there is none.
    """
    sequence, chunk = chunk_indices.to(torch.int64).unbind(1)
    real = sequence >= 0
    place = torch.arange(chunk_size, device=chunk_indices.device)
    first = cu_seqlens[torch.where(real, sequence, 0)] + chunk * chunk_size
    last = cu_seqlens[torch.where(real, sequence + 1, 0)]
    token = first[:, None] + place
    return torch.where(real[:, None] & (token < last[:, None]), token, total_tokens)


def real_rows(x: Tensor, cu_seqlens: Tensor | None, fill: float) -> Tensor:
    """`x [B, T, ...]` with `fill` in the rows past the last sequence.

    Results from padding are discarded, but their derivatives would be NaN where it holds NaN.
    """
    if cu_seqlens is None:
        return x
    token = torch.arange(x.shape[1], device=x.device).view(-1, *(1,) * (x.dim() - 2))
    return torch.where(token < cu_seqlens[-1], x, fill)


def sequence_offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[N + 1]`, int64: `cu_seqlens`, or the offsets of the rows of a dense batch."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    sequences = x.shape[0] if x.dim() == 3 else 1
    return torch.arange(sequences + 1, device=x.device) * x.shape[-2]


def known(x: Tensor) -> bool:
    """Whether values can be read without synchronizing: the tensor is real, and not on a GPU."""
    return type(x) is Tensor and x.device.type == "cpu"


def even_length(offsets: Tensor, rows: int) -> int | None:
    """The length of each sequence, if all are equally long, fill all rows, and are `known`."""
    sequences = len(offsets) - 1
    if not known(offsets) or rows == 0 or sequences == 0:
        return None
    tokens, rest = divmod(rows, sequences)
    if rest or tokens == 0:
        return None
    return tokens if offsets.tolist() == [*range(0, rows + 1, tokens)] else None


def pages_of(
    state_indices: Tensor | None, sequences: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The page of each sequence, `[N]`, int64, and whether it has one, `[N]`, bool; 0 where not.

    The one rule of all operators: slot 0 and negative slots are padding. Without `state_indices`
    sequence n is on page n, page 0 included.
    """
    if state_indices is None:
        every = torch.arange(sequences, device=device)
        return every, torch.ones_like(every, dtype=torch.bool)
    slots = state_indices.long()
    live = slots > 0
    return slots.where(live, 0), live


def page_index(slots: Tensor) -> Any:
    """What to index pages with for `slots [N]`, int64: a slice where they are `known` to follow one
    another, which gathers nothing.
    """
    if known(slots) and len(slots):
        first, *rest = slots.tolist()
        if first >= 0 and rest == [*range(first + 1, first + len(slots))]:
            return slice(first, first + len(slots))
    return slots


def check_varlen_values(
    x: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None, chunk_size: int
) -> None:
    """Contents of `cu_seqlens` for `x [1, T, ...]`, and of the chunk table."""
    if cu_seqlens is None:
        return
    check_cu_seqlens_values(cu_seqlens, x.shape[1])
    if chunk_indices is not None:
        check_chunk_indices_values(chunk_indices, cu_seqlens, x.shape[1], chunk_size)


def check_chunk_indices_values(
    chunk_indices: Tensor, cu_seqlens: Tensor, total_tokens: int, chunk_size: int
) -> None:
    """`chunk_indices` is the chunk table of valid `cu_seqlens`."""
    from kda_ops.varlen import prepare_chunk_indices

    expected = prepare_chunk_indices(cu_seqlens, total_tokens, chunk_size)
    wrong = (expected != chunk_indices).any(dim=1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"chunk_indices must be the chunk table of cu_seqlens, expected row {row} to be "
            f"{expected[row].tolist()}, got {chunk_indices[row].tolist()}"
        )
