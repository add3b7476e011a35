"""The gradients of both chunked operators on a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.gradient_general import launch_general_gradient
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs, has_fast_gradient, launch_gradient


def launch_chunked_backward(
    inputs: Inputs, normalized: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]],
    names: Sequence[str | None], output_final_state: bool,
    output_gradients: Sequence[Tensor | None], needs_gradient: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the arguments that need one, in order and in their dtypes.

    `normalized` returns the q, k, gate and beta of `chunk_kda`; `names`: the operator's arguments
    by their names in `inputs`, None where there is no gradient.
    """
    q, v = inputs.q, inputs.v
    do, dfinal = output_gradients
    do = torch.zeros_like(v) if do is None else do
    dfinal = dfinal if output_final_state else None
    needed = [name for name, need in zip(names, needs_gradient, strict=True) if need and name]
    if has_fast_gradient(q.dtype, q.shape[3], v.shape[3]):
        found = launch_gradient(inputs, do, dfinal, frozenset(needed))
    else:
        found = launch_general_gradient(inputs, normalized(), do, dfinal, frozenset(needed))
    return [found[name] for name in needed]
