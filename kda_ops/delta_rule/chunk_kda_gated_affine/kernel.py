"""Chunked KDA as an affine function: the `prepare` of `chunk_kda_gated`, and one `scan` of the
state and of K columns more.
"""

from torch import Tensor

from kda_ops.delta_rule.chunked.kernels.prepare_gated import gated_prepare
from kda_ops.delta_rule.chunked.launch import launch_chunks_affine
from kda_ops.delta_rule.chunked.states import Raw
from kda_ops.delta_rule.chunked.workspace import Batch, dense_rows


def launch_chunk_kda_gated_affine(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, entered: Tensor | None, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    q, k, v, raw_gate, raw_beta = dense_rows(q, k, v, raw_gate, raw_beta)
    batch = Batch.of(q, cu_seqlens, chunk_indices)
    prepare = gated_prepare(q, k, v, raw_gate, raw_beta, raw, scale, batch)
    return launch_chunks_affine(q, v, batch, prepare, initial_state, entered)
