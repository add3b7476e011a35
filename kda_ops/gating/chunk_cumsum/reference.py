"""The chunk-local cumulative sum in eager PyTorch."""

from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.gating.formulas import chunk_local_cumsum


def chunk_cumsum_reference(
    g: Tensor, chunk_size: int, scale: float, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    return (
        chunk_local_cumsum(g.to(accumulation_dtype(g)), chunk_size, cu_seqlens, chunk_indices)
        * scale
    )
