"""The forward of a layer, from its hidden states to its output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kda_ops.config import resolve_layout
from kda_ops.nn import mixing
from kda_ops.nn.call_checks import check_call, check_context_call, check_step
from kda_ops.nn.context_mixing import context_prefill
from kda_ops.nn.input_projection import project
from kda_ops.nn.states import State, fresh_layout, fresh_state
from kda_ops.varlen import prepare_chunk_indices

if TYPE_CHECKING:
    from kda_ops.cache.batch import KDABatch
    from kda_ops.nn.layer import KimiDeltaAttention as Layer


def apply(
    layer: Layer,
    hidden_states: Tensor,
    state: State | None,
    batch: KDABatch | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    *,
    output_state: bool,
) -> Tensor | tuple[Tensor, State]:
    """`KimiDeltaAttention.forward` with the weights of `layer`, a layer or one rank's share of it,
    whose output is then a term of the sum over the ranks.
    """
    check_call(layer, hidden_states, state, batch, cu_seqlens, chunk_indices)
    if layer.context is not None:
        check_context_call(state, chunk_indices, output_state)
    layout = resolve_layout(layer.conv_layout, None if state is None else state[0], layer.conv_dim)
    inputs = project(layer, hidden_states)
    if layer.context is not None:
        o, offsets = context_prefill(layer, hidden_states, inputs, cu_seqlens)
        o = mixing.normalized(layer, o, inputs.output_gate, offsets)
    elif batch is not None and state is not None:
        check_step(layer, hidden_states, inputs, state)
        o = mixing.step(layer, inputs, state, batch, layout)
    else:
        x, state_indices = inputs.x, None
        if cu_seqlens is not None and chunk_indices is None:
            chunk_indices = prepare_chunk_indices(cu_seqlens, x.shape[1])
        if output_state:
            layout = fresh_layout(layer, x)
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = fresh_state(layer, sequences + 1, x, layout)
            state_indices = torch.arange(1, sequences + 1, device=x.device)
        o = mixing.prefill(
            layer, inputs, state, state_indices, None, cu_seqlens, chunk_indices, layout
        )
    output = layer.o_proj(o.flatten(-2))
    if not output_state:
        return output
    assert state is not None
    return output, state
