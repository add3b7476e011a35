"""A whole decode step in eager PyTorch, composed of the formulas of its parts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.conv.formulas import conv_update, packed_bias, packed_state
from kda_ops.delta_rule.formulas import recurrence, source_pages
from kda_ops.gating.formulas import gate_nats
from kda_ops.norm.formulas import gated_rms_norm, l2_normalized
from kda_ops.varlen import even_length


def kda_decode_reference(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    raw_gate: Tensor, raw_beta: Tensor, output_gate: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float, norm_weight: Tensor,
    norm_eps: float, qk_norm_eps: float, scale: float, state: Tensor,
    state_indices: Tensor | None, num_accepted: Tensor | None, cu_seqlens: Tensor | None,
    state_layout: str, layout: str,
) -> Tensor:  # fmt: skip
    """Nothing is rounded between the parts."""
    T, (HV, K), V = x.shape[0], raw_gate.shape[-2:], output_gate.shape[-1]
    acc = accumulation_dtype(x)
    offsets = torch.arange(T + 1, device=x.device) if cu_seqlens is None else cu_seqlens.long()
    key_dim = (x.shape[1] - HV * V) // 2
    y = conv_update(
        x.to(acc), conv_state, weight, bias, activation, state_indices, num_accepted, offsets,
        layout,
    )  # fmt: skip
    q, k, v = y[None].split([key_dim, key_dim, HV * V], dim=-1)
    q, k = (l2_normalized(y.unflatten(-1, (-1, K)), qk_norm_eps) for y in (q, k))
    o = recurrence(
        q, k, v.unflatten(-1, (HV, V)),
        gate_nats(raw_gate.reshape(1, T, HV, K), A_log, dt_bias, lower_bound),
        beta_scale * torch.sigmoid(raw_beta.reshape(1, T, HV).to(acc)), state, state_indices,
        num_accepted, scale, offsets, state_layout,
    )  # fmt: skip
    normed = gated_rms_norm(o, output_gate.reshape(1, T, HV, V), norm_weight, norm_eps)
    source, live = source_pages(state_indices, num_accepted, len(offsets) - 1, x.device)
    live = live & (source < len(state))
    if even_length(offsets, T) is not None and bool(live.all()):
        return normed.to(x.dtype)
    sequence = torch.searchsorted(offsets, torch.arange(T, device=x.device), right=True) - 1
    live = F.pad(live, (0, 1))[sequence]
    return torch.where(live[:, None, None], normed, 0.0).to(x.dtype)


def kda_decode_unpacked_reference(*args: Any) -> Tensor:
    """Takes inputs, convolution states, weights and biases, each of q, k and v, then the step,
    ending with the layout.
    """
    xs, states, weights, biases, step = args[0:3], args[3:6], args[6:9], args[9:12], args[12:]
    with packed_state(states, step[-1]) as conv_state:
        return kda_decode_reference(
            torch.cat(xs, dim=-1), conv_state, torch.cat(weights), packed_bias(*biases), *step
        )
