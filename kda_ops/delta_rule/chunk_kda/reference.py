"""Chunked KDA in eager PyTorch: the definition, the CPU implementation and, from fp64 inputs, the
oracle.
"""

from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.formulas import chunked_kda, chunked_kda_state


def chunk_kda_reference(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return chunked_kda(
        q, k, v, g_cumsum, beta, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_kda_state_reference(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float, state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, state_layout: str, block_table: Tensor | None,
    context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    return chunked_kda_state(
        q, k, v, g_cumsum, beta, scale, state, state_indices, has_initial_state, cu_seqlens,
        state_layout, Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip
