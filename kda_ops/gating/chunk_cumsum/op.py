"""The chunk-local cumulative sum: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import check_chunk_size, check_dtype, check_number, check_varlen
from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops._registry import define_op, selected
from kda_ops._roles import CHUNKS, OFFSETS
from kda_ops.gating.chunk_cumsum.reference import chunk_cumsum_reference
from kda_ops.varlen import check_varlen_values, prepare_chunk_indices


def chunk_cumsum_fake(g: Tensor) -> Tensor:
    return torch.empty(g.shape, dtype=accumulation_dtype(g), device=g.device)


def _check_values(
    g: Tensor, chunk_size: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None
) -> None:
    check_varlen_values(g, cu_seqlens, chunk_indices, chunk_size)


chunk_cumsum_op = define_op(
    "chunk_cumsum(Tensor g, int chunk_size, float scale, Tensor? cu_seqlens, Tensor? chunk_indices)"
    " -> Tensor",
    reference=chunk_cumsum_reference,
    fake=chunk_cumsum_fake,
    cuda="kda_ops.gating.chunk_cumsum.kernel:launch_chunk_cumsum",
    roles={"cu_seqlens": OFFSETS, "chunk_indices": CHUNKS},
    check_values=_check_values,
)


def chunk_cumsum(
    g: Tensor,
    *,
    chunk_size: int = CHUNK,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Inclusive prefix sum along T that restarts every `chunk_size` tokens and at every sequence
    start.

    `out[t] = scale * sum(g[s] for s from the start of t's chunk up to t)`. Chunks are counted from
    the start of each sequence; the last one of a sequence may be short. Compiled for a GPU, it
    fuses with the producers of `g`, and a scaling of the result folds into `scale`.

    Source: Kimi Linear (arXiv:2510.26692), section 4, the cumulative decay of the chunkwise form.

    Args:
        g: `[B, T, ...]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides.
        chunk_size: Tokens per chunk, a power of two from 16 to 256.
        scale: Scale of the result; `RCP_LN2` converts nats to log2.
        cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences; first 0, non-decreasing,
            last at most T. Needs `B = 1`. None means that every batch entry is one sequence.
        chunk_indices: `prepare_chunk_indices(cu_seqlens, T, chunk_size)`, if already computed.

    Returns:
        `[B, T, ...]` in the **unit of g times scale**, fp32 (fp64 for fp64 inputs), contiguous.
        Rows past the last sequence are zero, whatever `g` holds there.

    Raises:
        ValueError: An invalid shape, dtype, device or `chunk_size`; wrong offsets or a wrong chunk
            table.
    """
    check_dtype("g", g)
    if g.dim() < 2:
        raise ValueError(f"g must have shape [B, T, ...], got {tuple(g.shape)}")
    check_chunk_size(chunk_size)
    check_number("scale", scale)
    check_varlen("g", g, cu_seqlens, chunk_indices, chunk_size)
    if cu_seqlens is not None and chunk_indices is None:
        chunk_indices = prepare_chunk_indices(cu_seqlens, g.shape[1], chunk_size)
    return selected(chunk_cumsum_op)(g, chunk_size, scale, cu_seqlens, chunk_indices)
