"""The schema and the checks that operators of chunked KDA have in common."""

from torch import Tensor

from kda_ops._checks import (
    check_attention_inputs,
    check_beta_scale,
    check_device,
    check_gate_parameters,
    check_not_negative,
    check_page_values,
    check_shape,
)
from kda_ops._numerics import CHUNK
from kda_ops.blocks import Blocks, check_block_values
from kda_ops.varlen import check_varlen_values, sequence_offsets

RAW_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor raw_gate, Tensor raw_beta, Tensor? A_log, "
    "Tensor? dt_bias, float? lower_bound, float beta_scale, float? qk_norm_eps, float scale"
)


def check_chunk_values(q: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> None:
    check_varlen_values(q, cu_seqlens, chunk_indices, CHUNK)


def check_chunk_state_values(
    q: Tensor, state: Tensor, state_indices: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, block_table: Tensor | None, context_lens: Tensor | None,
    block_tokens: int,
) -> None:  # fmt: skip
    check_chunk_values(q, cu_seqlens, chunk_indices)
    check_page_values(state, state_indices)
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    offsets = sequence_offsets(q[:, :, 0], cu_seqlens)
    check_block_values(state.shape[0], state_indices, offsets, blocks)


def check_raw_inputs(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float,
    qk_norm_eps: float | None,
) -> None:  # fmt: skip
    check_attention_inputs(q, k, v, raw_beta, "raw_beta")
    check_gate_parameters(raw_gate, A_log, dt_bias, lower_bound)
    check_shape("raw_gate", raw_gate, (*v.shape[:3], q.shape[3]))
    check_device(q=q, k=k, v=v, raw_gate=raw_gate, raw_beta=raw_beta)
    check_beta_scale(beta_scale)
    if qk_norm_eps is not None:
        check_not_negative("qk_norm_eps", qk_norm_eps)
