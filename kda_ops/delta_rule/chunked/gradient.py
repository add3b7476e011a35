"""The gradients of both chunked operators on a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.gradient_general import launch_general_gradient
from kda_ops.delta_rule.chunked.gradient_workspace import Saved, has_fast_gradient
from kda_ops.delta_rule.chunked.kernels.gradient import (
    Inputs,
    launch_gradient,
    launch_saving_forward,
)
from kda_ops.delta_rule.chunked.states import empty_final_state


def launch_chunked_backward(
    inputs: Inputs, normalized: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]],
    names: Sequence[str | None], output_final_state: bool,
    output_gradients: Sequence[Tensor | None], needs_gradient: Sequence[bool],
    saved: tuple[Tensor | None, ...] = (), o: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the arguments that need one, in order and in their dtypes.

    `normalized` returns the q, k, gate and beta of `chunk_kda`; `names`: the operator's arguments
    by their names in `inputs`, None where there is no gradient; `saved`: what the forward saved,
    Nones if nothing; `o`: its output, where that was saved too.
    """
    q, v = inputs.q, inputs.v
    do, dfinal = output_gradients
    do = torch.zeros_like(v) if do is None else do
    dfinal = dfinal if output_final_state else None
    needed = [name for name, need in zip(names, needs_gradient, strict=True) if need and name]
    if has_fast_gradient(q.dtype, q.shape[3], v.shape[3]):
        known = [x for x in saved if x is not None]
        read = Saved(*known) if known else None
        found = launch_gradient(inputs, do, dfinal, frozenset(needed), read, o)
    else:
        found = launch_general_gradient(inputs, normalized(), do, dfinal, frozenset(needed))
    return [found[name] for name in needed]


def launch_chunked_saving(inputs: Inputs, output_final_state: bool) -> tuple[Tensor, ...]:
    """Output, final states, and what the gradient reads."""
    x = inputs
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    final = empty_final_state(x.q, x.v, x.initial_state, output_final_state, x.cu_seqlens)
    return o, final, *launch_saving_forward(x, o, final if output_final_state else None)
