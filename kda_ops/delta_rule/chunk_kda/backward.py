"""The gradient of `chunk_kda` on a GPU."""

from collections.abc import Sequence

from torch import Tensor

from kda_ops.delta_rule.chunked.gradient import launch_chunked_backward, launch_chunked_saving
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs
from kda_ops.delta_rule.chunked.states import NOT_RAW

NAMES = ("q", "k", "v", "gate", "beta", None, "initial_state", None, None, None)


def launch_chunk_kda_backward(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, output_gradients: Sequence[Tensor | None],
    needs_gradient: Sequence[bool], tiles: Tensor | None = None, rows: Tensor | None = None,
    states: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    inputs = _inputs(q, k, v, g_cumsum, beta, scale, initial_state, cu_seqlens, chunk_indices)
    return launch_chunked_backward(
        inputs, lambda: (q, k, g_cumsum, beta), NAMES, output_final_state, output_gradients,
        needs_gradient, (tiles, rows, states),
    )  # fmt: skip


def launch_chunk_kda_saving(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The forward whose gradient takes what it saves."""
    inputs = _inputs(q, k, v, g_cumsum, beta, scale, initial_state, cu_seqlens, chunk_indices)
    return launch_chunked_saving(inputs, output_final_state)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, g_cumsum: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Inputs:  # fmt: skip
    tables = (cu_seqlens, chunk_indices)
    return Inputs(q, k, v, g_cumsum, beta, NOT_RAW, scale, initial_state, *tables, gated=False)
