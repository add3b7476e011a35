"""Chunked KDA from raw inputs in eager PyTorch, composed of the formulas of its parts."""

from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.formulas import chunked_kda, chunked_kda_state, used_inputs
from kda_ops.delta_rule.chunked.states import Raw


def chunk_kda_gated_reference(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    q, k, g_cumsum, beta = used_inputs(q, k, raw_gate, raw_beta, raw, cu_seqlens, chunk_indices)
    return chunked_kda(
        q, k, v, g_cumsum, beta, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_kda_gated_state_reference(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, state: Tensor, state_indices: Tensor | None, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None, state_layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    q, k, g_cumsum, beta = used_inputs(q, k, raw_gate, raw_beta, raw, cu_seqlens, chunk_indices)
    return chunked_kda_state(
        q, k, v, g_cumsum, beta, scale, state, state_indices, has_initial_state, cu_seqlens,
        state_layout, Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip
