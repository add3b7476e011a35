"""The layer in the style of transformers: three projections concatenated for one convolution, the
softplus as a `where`, norms with a square root and a division, all in plain PyTorch.
"""

import torch
from torch import Tensor, nn

import kda_ops
from kda_ops._numerics import RCP_LN2
from tests.lowering.styles import Cache, conv_state


class ForgetGate(nn.Module):
    """Low-rank projection and gate."""

    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, lower_bound: float | None
    ) -> None:
        super().__init__()
        self.head_dim, self.lower_bound = head_dim, lower_bound
        self.f_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, num_heads * head_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.randn(num_heads * head_dim))
        self.A_log = nn.Parameter(torch.empty(1, 1, num_heads, 1).uniform_(1, 16).log())

    def forward(self, hidden_states: Tensor) -> Tensor:
        f = self.f_b_proj(self.f_a_proj(hidden_states))
        z = f.float() + self.dt_bias.float().view(1, 1, -1)
        z = z.view(*hidden_states.shape[:2], -1, self.head_dim)
        rate = torch.exp(self.A_log.float())
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate * z)
        return -rate * torch.where(z > 20.0, z, torch.log(1.0 + torch.exp(z)))


class RMSNormGated(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = self.weight.to(torch.float32) * hidden_states
        return (hidden_states * torch.sigmoid(gate.to(torch.float32))).to(dtype)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + eps)


class KimiLinearDeltaAttention(nn.Module):
    """The layer. `decode`: every sequence of the batch has one token, and a state in the cache."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        *,
        conv_size: int = 4,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads = head_dim, num_heads
        self.qkv_dim = qkv_dim = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, qkv_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, qkv_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, qkv_dim, bias=False)
        self.conv1d = nn.Conv1d(3 * qkv_dim, 3 * qkv_dim, conv_size, groups=3 * qkv_dim, bias=False)
        self.forget_gate = ForgetGate(hidden_size, head_dim, num_heads, lower_bound)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.g_b_proj = nn.Linear(head_dim, qkv_dim, bias=False)
        self.o_norm = RMSNormGated(head_dim, norm_eps)
        self.o_proj = nn.Linear(qkv_dim, hidden_size, bias=False)

    def cache(self, state_indices: Tensor, pages: int, layout: str) -> Cache:
        """One convolution state and the recurrent one, both of zeros."""
        rows, like, K = self.conv1d.kernel_size[0] - 1, self.q_proj.weight, self.head_dim
        return Cache(
            conv_state(pages, rows, 3 * self.qkv_dim, layout, like),
            like.new_zeros(pages, self.num_heads, K, K, dtype=torch.float32),
            state_indices,
            torch.zeros_like(state_indices, dtype=torch.bool),
            layout,
        )

    def convolved(
        self, mixed_qkv: Tensor, cache: Cache | None, cu_seqlens: Tensor | None, decode: bool
    ) -> Tensor:
        weight = self.conv1d.weight.squeeze(1)
        if cache is None:
            return kda_ops.short_conv(mixed_qkv, weight, cu_seqlens=cu_seqlens)
        paged = {
            "state_indices": cache.state_indices,
            "cu_seqlens": cu_seqlens,
            "layout": cache.layout,
        }
        if decode:
            x = mixed_qkv if cu_seqlens is None else mixed_qkv.squeeze(0)
            y = kda_ops.short_conv_update(x, cache.conv, weight, **paged)
            return y if cu_seqlens is None else y.unsqueeze(0)
        return kda_ops.short_conv(
            mixed_qkv,
            weight,
            conv_state=cache.conv,
            has_initial_state=cache.has_initial_state,
            **paged,
        )

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        decode: bool = False,
    ) -> Tensor:
        batch_size, seq_len = hidden_states.shape[:2]
        hidden_shape = (batch_size, seq_len, -1, self.head_dim)
        mixed_qkv = torch.cat(
            [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)],
            dim=-1,
        )
        mixed_qkv = self.convolved(mixed_qkv, cache, cu_seqlens, decode)
        query, key, value = torch.split(mixed_qkv, [self.qkv_dim] * 3, dim=-1)
        query = l2norm(query.view(hidden_shape))
        key = l2norm(key.view(hidden_shape))
        value = value.view(hidden_shape)
        g = self.forget_gate(hidden_states)
        beta = torch.sigmoid(self.b_proj(hidden_states))
        if decode and cache is not None:
            o = kda_ops.recurrent_kda(
                query,
                key,
                value,
                g,
                beta,
                cache.recurrent,
                cache.state_indices,
                cu_seqlens=cu_seqlens,
            )
        else:
            G = kda_ops.chunk_cumsum(
                g, scale=RCP_LN2, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
            )
            paged = {}
            if cache is not None:
                paged = {
                    "state": cache.recurrent,
                    "state_indices": cache.state_indices,
                    "has_initial_state": cache.has_initial_state,
                }
            o, _ = kda_ops.chunk_kda(
                query,
                key,
                value,
                G,
                beta,
                cu_seqlens=cu_seqlens,
                chunk_indices=chunk_indices,
                **paged,
            )
        gate = self.g_b_proj(self.g_a_proj(hidden_states)).view(hidden_shape)
        return self.o_proj(self.o_norm(o, gate).reshape(batch_size, seq_len, -1))
