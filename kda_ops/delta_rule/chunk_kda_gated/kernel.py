"""Chunked KDA from raw inputs as two Triton kernels, `prepare` and `scan`; see
`kda_ops.delta_rule.chunked`, which shares both with other operators.
"""

from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.delta_rule.chunked.kernels.prepare_gated import gated_prepare
from kda_ops.delta_rule.chunked.launch import launch_chunks
from kda_ops.delta_rule.chunked.states import Raw, States, empty_final_state
from kda_ops.delta_rule.chunked.workspace import Batch, dense_rows


def _launch(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, raw: Raw, scale: float,
    states: States, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns the output and writes the final states."""
    q, k, v, raw_gate, raw_beta = dense_rows(q, k, v, raw_gate, raw_beta)
    batch = Batch.of(q, cu_seqlens, chunk_indices)
    prepare = gated_prepare(q, k, v, raw_gate, raw_beta, raw, scale, batch)
    return launch_chunks(q, v, batch, prepare, states)


def launch_chunk_kda_gated(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    final = empty_final_state(q, v, initial_state, output_final_state, cu_seqlens)
    states = States(initial_state, final if output_final_state else None)
    o = _launch(q, k, v, raw_gate, raw_beta, raw, scale, states, cu_seqlens, chunk_indices)
    return o, final


def launch_chunk_kda_gated_state(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, state: Tensor, state_indices: Tensor | None, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None, state_layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    states = States(None, state, state_indices, has_initial_state, True, state_layout, blocks)
    return _launch(q, k, v, raw_gate, raw_beta, raw, scale, states, cu_seqlens, chunk_indices)
