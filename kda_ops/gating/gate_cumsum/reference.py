"""The cumulative gate in eager PyTorch."""

from torch import Tensor

from kda_ops.gating.formulas import cumulative_gate


def gate_cumsum_reference(
    raw_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    chunk_size: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    return cumulative_gate(
        raw_gate, A_log, dt_bias, lower_bound, chunk_size, cu_seqlens, chunk_indices,
        to_be_seen=True,
    )  # fmt: skip
