"""The chunk table of a variable-length batch: each program's sequence, and its chunk of that."""

import torch
from torch import Tensor

from kda_ops._checks import check_cu_seqlens_shape, check_integer
from kda_ops.formulas import CHUNK

EMPTY = -1


def chunk_table(cu_seqlens: Tensor, total_tokens: int, chunk_size: int = CHUNK) -> Tensor:
    """Maps chunk programs to sequences, on the device of `cu_seqlens` and without synchronising
    with it.

    Compute it once per batch and hand it to every operator and layer that takes `chunks`. It is
    made of ordinary tensor operations: it compiles, and it can be captured in a CUDA graph and
    replayed with other `cu_seqlens` of the same length.

    Args:
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; first 0,
            non-decreasing, last at most `total_tokens`.
        total_tokens: T, the number of rows that `cu_seqlens` indexes, padding included.
        chunk_size: Tokens per chunk.

    Returns:
        `[T // chunk_size + N, 2]`, int32: (sequence, chunk of that sequence), in order. That many
        rows always suffice; rows past the real count hold `(-1, -1)` and a program that reads one
        returns at once.

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
    # never empty, also without sequences: a search in nothing does not compile for a GPU
    starts = torch.nn.functional.pad(ends, (1, 0))
    row = torch.arange(total_tokens // chunk_size + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    real = sequence < sequences
    chunk = row - starts[sequence]
    table = torch.stack([sequence, chunk], dim=1)
    return torch.where(real[:, None], table, EMPTY).to(torch.int32)
