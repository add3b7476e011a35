"""The cumulative gate: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import (
    check_chunk_size,
    check_gate_parameters,
    check_rank,
    check_varlen,
    rates_of,
)
from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops._registry import define_op, selected
from kda_ops._roles import CHUNKS, OFFSETS
from kda_ops.gating.gate_cumsum.reference import gate_cumsum_reference
from kda_ops.varlen import check_varlen_values, prepare_chunk_indices


def gate_cumsum_fake(raw_gate: Tensor) -> Tensor:
    return torch.empty(raw_gate.shape, dtype=accumulation_dtype(raw_gate), device=raw_gate.device)


def _check_values(
    raw_gate: Tensor, chunk_size: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None
) -> None:
    check_varlen_values(raw_gate, cu_seqlens, chunk_indices, chunk_size)


gate_cumsum_op = define_op(
    "gate_cumsum(Tensor raw_gate, Tensor? A_log, Tensor? dt_bias, float? lower_bound, "
    "int chunk_size, Tensor? cu_seqlens, Tensor? chunk_indices) -> Tensor",
    reference=gate_cumsum_reference,
    fake=gate_cumsum_fake,
    cuda="kda_ops.gating.gate_cumsum.kernel:launch_gate_cumsum",
    roles={"cu_seqlens": OFFSETS, "chunk_indices": CHUNKS},
    check_values=_check_values,
)


def gate_cumsum(
    raw_gate: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    *,
    lower_bound: float | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """The cumulative log2 decay of every token since the start of its chunk, in one pass over
    memory.

    Equals `chunk_cumsum(gate(raw_gate, A_log, dt_bias, lower_bound=lower_bound), scale=RCP_LN2)`,
    the `g_cumsum` of `chunk_kda`; see `gate` for the formula and `chunk_cumsum` for the chunks.

    Source: Kimi Linear (arXiv:2510.26692), sections 3 and 4.

    Args:
        raw_gate: `[B, T, HV, K]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides.
        A_log: `[HV]` or `[1, 1, HV, 1]`, natural log of the decay rate. None means `a = 1` and
            needs `lower_bound`.
        dt_bias: `[HV, K]` or `[HV * K]`, added to raw_gate.
        lower_bound: None, or a bound in `[-5, 0)` in nats.
        chunk_size: Tokens per chunk, a power of two from 16 to 256.
        cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences; first 0, non-decreasing,
            last at most T. Needs `B = 1`. None means that every batch entry is one sequence.
        chunk_indices: `prepare_chunk_indices(cu_seqlens, T, chunk_size)`, if already computed.

    Returns:
        G, `[B, T, HV, K]` in **log2**, fp32 (fp64 for fp64 inputs), contiguous. Sums that overflow
        become the least finite number. Rows past the last sequence are zero, whatever `raw_gate`
        holds there.

    Raises:
        ValueError: An invalid shape, dtype, device, `lower_bound` or `chunk_size`; wrong offsets or
            a wrong chunk table.
    """
    check_rank("raw_gate", raw_gate, 4)
    check_gate_parameters(raw_gate, A_log, dt_bias, lower_bound)
    check_chunk_size(chunk_size)
    check_varlen("raw_gate", raw_gate, cu_seqlens, chunk_indices, chunk_size)
    if cu_seqlens is not None and chunk_indices is None:
        chunk_indices = prepare_chunk_indices(cu_seqlens, raw_gate.shape[1], chunk_size)
    return selected(gate_cumsum_op)(
        raw_gate, rates_of(A_log), dt_bias, lower_bound, chunk_size, cu_seqlens, chunk_indices
    )
