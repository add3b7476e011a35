"""The cumulative gate in eager PyTorch."""

from torch import Tensor

from kda_ops.gating.formulas import cumulative_gate


def gate_cumsum_reference(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    chunks: Tensor | None,
) -> Tensor:
    return cumulative_gate(
        x, A_log, dt_bias, lower_bound, chunk_size, cu_seqlens, chunks, to_be_seen=True
    )
