"""The layer in plain PyTorch, token by token: the formulas in the docstring of the layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import QK_NORM_EPS
from kda_ops.nn.layer import KimiDeltaAttention


def naive_layer(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
    """`layer(x)` by no operator of this package, `[B, T, hidden]`, from states of zero."""
    H, HV = layer.num_heads, layer.num_v_heads
    parts = {name: F.linear(x, weight) for name, weight in layer.in_parts().items()}
    taps = layer.conv_weight
    qkv = torch.cat([parts[name] for name in "qkv"], dim=-1).transpose(1, 2)
    qkv = F.conv1d(F.pad(qkv, (taps.shape[1] - 1, 0)), taps[:, None], groups=len(taps))
    qkv = F.silu(qkv).transpose(1, 2)
    q, k, v = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    q, k = (y.unflatten(-1, (H, -1)).float() for y in (q, k))
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + QK_NORM_EPS) for y in (q, k))
    q, k = (y.repeat_interleave(HV // H, dim=2) for y in (q, k))
    v, raw_gate = v.unflatten(-1, (HV, -1)).float(), parts["f"]
    if layer.f_proj is not None:
        raw_gate = layer.f_proj(raw_gate)
    z = (raw_gate.float() + layer.dt_bias).unflatten(-1, (HV, -1))
    rate = layer.A_log.exp()[:, None]
    if layer.lower_bound is None:
        decay = torch.exp(-rate * F.softplus(z))
    else:
        decay = torch.exp(layer.lower_bound * torch.sigmoid(rate * z))
    beta = torch.sigmoid(parts["b"].float())
    state = v.new_zeros(*v.shape[:1], HV, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        state = state * decay[:, t, :, :, None]
        found = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        change = beta[:, t, :, None] * (v[:, t] - found)
        state = state + k[:, t, :, :, None] * change[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = torch.stack(outputs, dim=1) * layer.head_k_dim**-0.5
    output_gate = parts.get("g", x)
    if layer.g_proj is not None:
        output_gate = layer.g_proj(output_gate)
    o = F.rms_norm(o, o.shape[-1:], layer.o_norm_weight.float(), layer.norm_eps)
    o = o * torch.sigmoid(output_gate.float().unflatten(-1, (HV, -1)))
    return layer.o_proj(o.flatten(-2).to(x.dtype))
