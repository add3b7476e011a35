"""Checks of a layer's call, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kda_ops import config
from kda_ops._checks import (
    STATES,
    check_cu_seqlens_shape,
    check_device,
    check_dtype,
    check_gate_parameters,
    check_kernel_dtype,
    check_not_negative,
    check_rank,
    check_shape,
    check_writable,
)
from kda_ops._gradients import refuse_derivatives
from kda_ops._tracing import reads_values
from kda_ops.cache.batch import KDABatch
from kda_ops.config import resolve_layout
from kda_ops.nn.input_projection import Projected
from kda_ops.nn.states import State

if TYPE_CHECKING:
    from kda_ops.nn.layer import KimiDeltaAttention as Layer


def check_call(
    layer: Layer,
    hidden_states: Tensor,
    state: State | None,
    batch: KDABatch | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> None:
    """Rejects inconsistent arguments before anything is computed."""
    check_rank("hidden_states", hidden_states, 3)
    check_dtype("hidden_states", hidden_states)
    check_device(A_log=layer.A_log, hidden_states=hidden_states)
    B, T = hidden_states.shape[:2]
    check_shape("hidden_states", hidden_states, (B, T, layer.hidden_size))
    if (state is None) != (batch is None):
        given, missing = ("state", "batch") if batch is None else ("batch", "state")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if cu_seqlens is not None:
        check_cu_seqlens_shape(cu_seqlens)
        if B != 1:
            raise ValueError(f"hidden_states must have batch size 1 with cu_seqlens, got {B}")
    if chunk_indices is not None and cu_seqlens is None:
        raise ValueError("chunk_indices must come with cu_seqlens, got chunk_indices alone")
    if batch is None or state is None:
        return
    if not isinstance(batch, KDABatch):
        raise ValueError(f"batch must be a KDABatch, got {type(batch).__name__}")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None with batch, which has its own")
    batch.check_rows(hidden_states)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise ValueError(f"state must be (conv, recurrent), got {type(state).__name__}")
    conv, recurrent = state
    check_rank("recurrent", recurrent, 4)
    check_dtype("recurrent", recurrent, STATES)
    check_shape(
        "recurrent",
        recurrent,
        (recurrent.shape[0], layer.num_v_heads, layer.head_v_dim, layer.head_k_dim),
    )
    if (conv is None) == layer.use_short_conv:
        expected = "a tensor" if layer.use_short_conv else "None"
        raise ValueError(f"conv must be {expected}, got {type(conv).__name__}")
    if conv is not None:
        check_rank("conv", conv, 3)
        layout = resolve_layout(layer.conv_layout, conv, layer.conv_dim)
        L = conv.shape[1 if layout == "SD" else 2]
        shape = (L, layer.conv_dim) if layout == "SD" else (layer.conv_dim, L)
        check_shape("conv", conv, (recurrent.shape[0], *shape))
        num_spec = 0 if batch.state_indices.dim() == 1 else batch.state_indices.shape[1] - 1
        fewest = layer.conv_size - 1 + num_spec
        if fewest > L:
            raise ValueError(f"conv must have a state length of at least {fewest}, got {L}")
    check_device(
        hidden_states=hidden_states,
        conv=conv,
        recurrent=recurrent,
        state_indices=batch.state_indices,
    )
    if (
        recurrent.is_cuda and config.impl == "auto"
    ):  # what operators after the first write would reject
        for name, x in (
            ("recurrent", recurrent),
            ("A_log", layer.A_log),
            ("dt_bias", layer.dt_bias),
            ("o_norm_weight", layer.o_norm_weight),
        ):
            check_kernel_dtype(name, x)
    on_cpu = recurrent.device.type == "cpu"
    if (on_cpu or config.check_values) and reads_values(batch.state_indices):
        batch.check_slots(recurrent.shape[0])


def check_context_call(
    state: State | None, chunk_indices: Tensor | None, output_state: bool
) -> None:
    """Rejects what a layer does not take while its tokens are spread over ranks."""
    if state is not None:
        raise ValueError("state must be None while the tokens are spread over a context, got one")
    if chunk_indices is not None:
        raise ValueError(
            "chunk_indices must be None while the tokens are spread over a context: each rank has "
            "chunks of its own"
        )
    if output_state:
        raise ValueError(
            "output_state must be False while the tokens are spread over a context: "
            "kda_ops.nn.context_chunk_kda returns final states"
        )


def check_step(layer: Layer, hidden_states: Tensor, inputs: Projected, state: State) -> None:
    """Rejects what the operators after the first write of a state would reject. (In compiled code
    they do so at trace time.)
    """
    if torch.compiler.is_compiling():
        return
    conv, recurrent = state
    x, raw_gate = inputs.x, inputs.raw_gate
    check_gate_parameters(raw_gate, layer.A_log, layer.dt_bias, layer.lower_bound, name="f")
    check_shape("o_norm_weight", layer.o_norm_weight, (layer.head_v_dim,))
    check_dtype("o_norm_weight", layer.o_norm_weight)
    check_device(hidden_states=hidden_states, o_norm_weight=layer.o_norm_weight)
    check_not_negative("norm_eps", layer.norm_eps)
    plain = type(layer.o_proj) is nn.Linear or not isinstance(layer.o_proj, nn.Module)
    if plain and not torch.is_autocast_enabled(x.device.type):
        weight = layer.o_proj.weight
        check_shape("o_proj.weight", weight, (weight.shape[0], layer.value_dim))
        check_dtype("o_proj.weight", weight, (x.dtype,))
    if recurrent.device.type == "cpu":
        check_writable(conv=conv, recurrent=recurrent)
    refuse_derivatives(
        type(layer).__name__,
        {
            "hidden_states": hidden_states,
            "the output of in_proj": x,
            "the output of f_proj": raw_gate,
            "beta": inputs.raw_beta,
            "conv_weight": layer.conv_weight,
            "conv_bias": layer.conv_bias,
            "A_log": layer.A_log,
            "dt_bias": layer.dt_bias,
            "conv": conv,
            "recurrent": recurrent,
        },
    )
