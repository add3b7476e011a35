"""The gradient of `chunk_kda_gated` on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kda_ops.delta_rule.chunk_kda_gated.kernel import gate_sizes, launch_inputs
from kda_ops.delta_rule.chunked.gradient_general import launch_general_gradient
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs, has_fast_gradient, launch_gradient
from kda_ops.delta_rule.chunked.workspace import Batch, dense_rows

NAMES = (
    "q",
    "k",
    "v",
    "gate",
    "beta",
    "A_log",
    "dt_bias",
    *(None,) * 4,
    "initial_state",
    *(None,) * 3,
)


def launch_chunk_kda_gated_backward(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, qk_norm_eps: float | None,
    scale: float, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, output_gradients: Sequence[Tensor | None],
    needs_gradient: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the arguments that need one, in order and in their dtypes."""
    inputs = Inputs(
        q, k, v, x, beta, A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps, scale,
        initial_state, cu_seqlens, chunk_indices, raw=True,
    )  # fmt: skip
    do, dfinal = output_gradients
    do = torch.zeros_like(v) if do is None else do
    needed = [name for name, need in zip(NAMES, needs_gradient, strict=True) if need and name]
    dfinal = dfinal if output_final_state else None
    if has_fast_gradient(q.dtype, q.shape[3], v.shape[3]):
        found = launch_gradient(inputs, do, dfinal, frozenset(needed))
    else:
        sizes = gate_sizes(q, v, A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps, cu_seqlens)
        batch = Batch.of(q, cu_seqlens, chunk_indices)
        used = launch_inputs(dense_rows(q, k, x, beta), A_log, dt_bias, batch, sizes)
        found = launch_general_gradient(inputs, used, do, dfinal, frozenset(needed))
    return [found[name] for name in needed]
