"""The gradient of `chunk_kda` on a GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.gradient_general import launch_general_gradient
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs, has_fast_gradient, launch_gradient

# None: no tensor that has a gradient
NAMES = ("q", "k", "v", "gate", "beta", None, "initial_state", None, None, None)


def launch_chunk_kda_backward(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None, output_gradients: Sequence[Tensor | None],
    needs_gradient: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the arguments that need one, in order and in their dtypes."""
    raw: Any = {"A_log": None, "dt_bias": None, "lower_bound": None, "beta_scale": 1.0}
    inputs = Inputs(
        q, k, v, G, beta,
        **raw, qk_norm_eps=None, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices, raw=False,
    )  # fmt: skip
    do, dfinal = output_gradients
    do = torch.zeros_like(v) if do is None else do
    needed = [name for name, need in zip(NAMES, needs_gradient, strict=True) if need and name]
    dfinal = dfinal if output_final_state else None
    if has_fast_gradient(q.dtype, q.shape[3], v.shape[3]):
        found = launch_gradient(inputs, do, dfinal, frozenset(needed))
    else:
        found = launch_general_gradient(inputs, (q, k, G, beta), do, dfinal, frozenset(needed))
    return [found[name] for name in needed]
