"""The layer in the style of flash-linear-attention: q, k and v unpacked from their projections to
the recurrence, each with its own convolution weight and state.

Gate, norms and gated norm, for which FLA has kernels, are plain PyTorch here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kda_ops
from kda_ops._numerics import RCP_LN2
from tests.lowering.styles import Cache, conv_state


class ShortConvolution(nn.Conv1d):
    """Depthwise, causal, followed by a SiLU."""

    def __init__(self, width: int, kernel_size: int, bias: bool) -> None:
        super().__init__(width, width, kernel_size, groups=width, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        decode: bool,
    ) -> Tensor:
        weight = self.weight.squeeze(1)
        if state is None or cache is None:
            return kda_ops.short_conv(x, weight, self.bias, cu_seqlens=cu_seqlens)
        paged = {
            "state_indices": cache.state_indices,
            "cu_seqlens": cu_seqlens,
            "layout": cache.layout,
        }
        if decode:
            x = x if cu_seqlens is None else x[0]
            y = kda_ops.short_conv_update(x, state, weight, self.bias, **paged)
            return y if cu_seqlens is None else y[None]
        return kda_ops.short_conv(
            x,
            weight,
            self.bias,
            conv_state=state,
            has_initial_state=cache.has_initial_state,
            **paged,
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm of a head in fp32, then the output gate."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float() * torch.sigmoid(gate.float())).to(x.dtype)


def l2_normalized(x: Tensor, eps: float = 1e-6) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)).to(x.dtype)


class KimiDeltaAttention(nn.Module):
    """The layer. `decode`: every sequence of the batch has one token and a state in the cache."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_v_heads: int | None = None,
        *,
        conv_size: int = 4,
        conv_bias: bool = False,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads = head_dim, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.lower_bound, self.allow_neg_eigval = lower_bound, allow_neg_eigval
        key_dim, value_dim = num_heads * head_dim, self.num_v_heads * head_dim
        self.widths = (key_dim, key_dim, value_dim)
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
        self.k_conv1d = ShortConvolution(key_dim, conv_size, conv_bias)
        self.v_conv1d = ShortConvolution(value_dim, conv_size, conv_bias)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, head_dim, bias=False),
            nn.Linear(head_dim, value_dim, bias=False),
        )
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.randn(value_dim))
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, value_dim)
        )
        self.o_norm = GatedRMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def cache(self, state_indices: Tensor, pages: int, layout: str) -> Cache:
        """Three convolution states and the recurrent one, all of zeros."""
        like, K = self.q_proj.weight, self.head_dim
        return Cache(
            tuple(
                conv_state(pages, conv.kernel_size[0] - 1, width, layout, like)
                for conv, width in zip(self.convolutions(), self.widths, strict=True)
            ),
            like.new_zeros(pages, self.num_v_heads, K, K, dtype=torch.float32),
            state_indices,
            torch.zeros_like(state_indices, dtype=torch.bool),
            layout,
        )

    def convolutions(self) -> tuple[ShortConvolution, ...]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def decay(self, f: Tensor) -> Tensor:
        """The gate in nats."""
        z = f.float() + self.dt_bias.view(-1, self.head_dim)
        rate = self.A_log.float().exp().unsqueeze(-1)
        if self.lower_bound is None:
            return -rate * F.softplus(z)
        return self.lower_bound * torch.sigmoid(rate * z)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        decode: bool = False,
    ) -> Tensor:
        states = (None, None, None) if cache is None else cache.conv
        q = self.q_conv1d(self.q_proj(hidden_states), states[0], cache, cu_seqlens, decode)
        k = self.k_conv1d(self.k_proj(hidden_states), states[1], cache, cu_seqlens, decode)
        v = self.v_conv1d(self.v_proj(hidden_states), states[2], cache, cu_seqlens, decode)
        g = self.f_proj(hidden_states)
        beta = torch.sigmoid(self.b_proj(hidden_states).float())
        if self.allow_neg_eigval:
            beta = beta * 2.0
        q, k, v, g = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v, g))
        q, k, g = l2_normalized(q), l2_normalized(k), self.decay(g)
        if decode and cache is not None:
            o = kda_ops.recurrent_kda(
                q, k, v, g, beta, cache.recurrent, cache.state_indices, cu_seqlens=cu_seqlens
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
                q, k, v, G, beta, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices, **paged
            )
        gate = self.g_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))
