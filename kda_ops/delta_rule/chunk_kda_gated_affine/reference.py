"""Chunked KDA from raw inputs as an affine function, in eager PyTorch."""

from torch import Tensor

from kda_ops.delta_rule.chunked.formulas import chunked_kda_affine, used_inputs
from kda_ops.delta_rule.chunked.states import Raw


def chunk_kda_gated_affine_reference(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, entered: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    q, k, g_cumsum, beta = used_inputs(q, k, raw_gate, raw_beta, raw, cu_seqlens, chunk_indices)
    return chunked_kda_affine(
        q, k, v, g_cumsum, beta, scale, initial_state, entered, cu_seqlens
    )  # fmt: skip
