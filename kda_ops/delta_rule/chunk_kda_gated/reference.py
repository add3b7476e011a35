"""Chunked KDA from raw inputs in eager PyTorch, composed of the formulas of its parts."""

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops.delta_rule.chunked.formulas import chunked_kda, chunked_kda_state
from kda_ops.gating.formulas import cumulative_gate
from kda_ops.norm.formulas import l2_normalized
from kda_ops.varlen import real_rows


def chunk_kda_gated_reference(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k = _keys(q, k, qk_norm_eps, cu_seqlens)
    gate = (raw_gate, A_log, dt_bias, lower_bound, CHUNK, cu_seqlens, chunk_indices)
    g_cumsum = cumulative_gate(*gate, to_be_seen=False)
    beta = _beta(beta, beta_scale, cu_seqlens)
    return chunked_kda(
        q, k, v, g_cumsum, beta, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_kda_gated_state_reference(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, state: Tensor, state_indices: Tensor, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    q, k = _keys(q, k, qk_norm_eps, cu_seqlens)
    gate = (raw_gate, A_log, dt_bias, lower_bound, CHUNK, cu_seqlens, chunk_indices)
    g_cumsum = cumulative_gate(*gate, to_be_seen=False)
    beta = _beta(beta, beta_scale, cu_seqlens)
    return chunked_kda_state(
        q, k, v, g_cumsum, beta, scale, state, state_indices, has_initial_state, cu_seqlens
    )


def _keys(
    q: Tensor, k: Tensor, qk_norm_eps: float | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The keys as they are used; nothing is rounded between the parts."""
    if qk_norm_eps is None:
        return q, k
    q, k = (l2_normalized(real_rows(y, cu_seqlens, 1.0), qk_norm_eps) for y in (q, k))
    return q, k


def _beta(beta: Tensor, beta_scale: float, cu_seqlens: Tensor | None) -> Tensor:
    wide = real_rows(beta, cu_seqlens, 0.0).to(accumulation_dtype(beta))
    return beta_scale * torch.sigmoid(wide)
