"""The gradient of `chunk_kda_gated` on a GPU."""

from collections.abc import Sequence

from torch import Tensor

from kda_ops.delta_rule.chunked.gradient import launch_chunked_backward, launch_chunked_saving
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs
from kda_ops.delta_rule.chunked.kernels.prepare_gated import launch_inputs
from kda_ops.delta_rule.chunked.states import Raw
from kda_ops.delta_rule.chunked.workspace import Batch

NAMES = (
    *("q", "k", "v", "gate", "beta", "A_log", "dt_bias", None, None, None, None),
    *("initial_state", None, None, None),
)


def launch_chunk_kda_gated_backward(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
    output_gradients: Sequence[Tensor | None], needs_gradient: Sequence[bool],
    o: Tensor | None = None, tiles: Tensor | None = None, rows: Tensor | None = None,
    states: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    tables = (cu_seqlens, chunk_indices)
    inputs = Inputs(q, k, v, raw_gate, raw_beta, raw, scale, initial_state, *tables, gated=True)

    def normalized() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return launch_inputs(q, k, raw_gate, raw_beta, raw, Batch.of(q, *tables))

    return launch_chunked_backward(
        inputs, normalized, NAMES, output_final_state, output_gradients, needs_gradient,
        (tiles, rows, states), o,
    )  # fmt: skip


def launch_chunk_kda_gated_saving(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The forward whose gradient takes what it saves."""
    raw = Raw(A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps)
    tables = (cu_seqlens, chunk_indices)
    inputs = Inputs(q, k, v, raw_gate, raw_beta, raw, scale, initial_state, *tables, gated=True)
    return launch_chunked_saving(inputs, output_final_state)
