"""The chunks of a batch: the table of a variable-length one (each program's sequence, and its chunk
of that), and the memory that chunked KDA takes for them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kda_ops._checks import check_cu_seqlens_shape, check_integer
from kda_ops.formulas import CHUNK

EMPTY = -1
# chunked KDA takes no more for its tiles at a time, unless one chunk of all heads needs it
WORKSPACE_BYTES = 256_000_000


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


def workspace_bytes(
    total_tokens: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    *,
    sequences: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of GPU memory that `chunk_kda` takes beside its inputs and results, and returns.

    `chunk_kda_gated` takes the same where K and V are 64 or 128 in 16 bits; at other sizes it also
    keeps the cumulative gate, `[B, T, HV, K]` in fp32, and normalised q and k. Where few heads are
    scanned in segments, a state in fp32 and a K x K matrix in fp16 per segment come to it, below
    10 MB on a GPU with 132 multiprocessors and not counted here. With 16 bits and 128 x 128 a chunk
    of a head takes 57,856 bytes in bf16 (90,624 in fp16), 239 MB at T = 8192 and 32 heads. What
    would be more than `WORKSPACE_BYTES` is worked off in slabs, one after the other.

    Args:
        total_tokens: `B * T`.
        num_v_heads: HV.
        head_k_dim: K.
        head_v_dim: V.
        sequences: N: the batch size, or `len(cu_seqlens) - 1`.
        dtype: Of q, k and v: fp16, bf16 or fp32.
    """
    sizes = (num_v_heads, head_k_dim, head_v_dim, dtype)
    rows = workspace_rows(total_tokens, sequences)
    slabs = workspace_slabs(rows, *sizes)
    states = 0
    if slabs > 1 or dtype == torch.float32:
        (columns,), _ = workspace_row(head_k_dim, head_v_dim, dtype)["decay"]
        states = 4 * max(sequences, 1) * num_v_heads * columns * head_v_dim
    return -(-rows // slabs) * _row_bytes(*sizes) + states


def workspace_row(
    K: int, V: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `chunk_kda`'s kernels keep of one chunk of one head."""
    KP = max(32 if dtype == torch.float32 else 16, 1 << (K - 1).bit_length())
    row: dict[str, tuple[tuple[int, ...], torch.dtype]]
    row = {"tiles": ((CHUNK * (3 * KP + CHUNK),), dtype)}
    if dtype != torch.bfloat16:
        # sums of 64 values do not always fit fp16; in bf16 the output is their place
        row["u"] = ((CHUNK, V), torch.float32)
    return row | {"decay": ((KP,), torch.float32)}


def workspace_rows(total_tokens: Any, sequences: Any) -> Any:
    """Rows of the workspace, one per chunk, as many as there can be."""
    return total_tokens // CHUNK + sequences


def workspace_slabs(rows: int, HV: int, K: int, V: int, dtype: torch.dtype) -> int:
    """In how many slabs of equal size that many rows are worked off."""
    most = max(WORKSPACE_BYTES // _row_bytes(HV, K, V, dtype), 1)
    return max(-(-rows // most), 1)


def _row_bytes(HV: int, K: int, V: int, dtype: torch.dtype) -> int:
    parts = workspace_row(K, V, dtype).values()
    return HV * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
