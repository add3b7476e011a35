"""The layer in the style of torchtitan's Kimi K3: packed tokens `[T, D]`, projections and taps
concatenated for one convolution, a bounded gate, a full-rank output gate, the norm of `F.rms_norm`.
For training alone, so it has no cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kda_ops
from kda_ops._numerics import RCP_LN2


class KDA(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        *,
        conv_size: int = 4,
        lower_bound: float = -5.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.head_dim, self.lower_bound, self.norm_eps = head_dim, lower_bound, norm_eps
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.q_conv = nn.Conv1d(width, width, conv_size, groups=width, bias=False)
        self.k_conv = nn.Conv1d(width, width, conv_size, groups=width, bias=False)
        self.v_conv = nn.Conv1d(width, width, conv_size, groups=width, bias=False)
        self.forget_a = nn.Linear(hidden_size, head_dim, bias=False)
        self.forget_b = nn.Linear(head_dim, width, bias=False)
        self.beta = nn.Linear(hidden_size, num_heads, bias=False)
        self.output_gate = nn.Linear(hidden_size, width, bias=False)
        self.output_norm = nn.Parameter(torch.ones(head_dim))
        self.output_proj = nn.Linear(width, hidden_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.randn(num_heads, head_dim))

    def convolved(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        taps = [conv.weight for conv in (self.q_conv, self.k_conv, self.v_conv)]
        taps = torch.cat(taps, dim=0)[:, 0]
        return kda_ops.short_conv(mixed.unsqueeze(0), taps, cu_seqlens=cu_seqlens)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        parts = self.convolved(x, cu_seqlens).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        raw_gate = self.forget_b(self.forget_a(x)).unflatten(-1, (-1, self.head_dim))
        gate = kda_ops.gate(
            raw_gate.unsqueeze(0),
            self.A_log.float(),
            self.dt_bias.float(),
            lower_bound=self.lower_bound,
        )
        G = kda_ops.chunk_cumsum(gate, scale=RCP_LN2, cu_seqlens=cu_seqlens)
        beta = self.beta(x).unsqueeze(0).float().sigmoid()
        q, k = kda_ops.l2norm(q), kda_ops.l2norm(k)
        o, _ = kda_ops.chunk_kda(q, k, v, G, beta, cu_seqlens=cu_seqlens)
        output_gate = self.output_gate(x).unflatten(-1, (-1, self.head_dim))
        normed = F.rms_norm(
            o.squeeze(0).float(), (self.head_dim,), self.output_norm.float(), self.norm_eps
        )
        out = (normed * output_gate.float().sigmoid()).to(x.dtype)
        return self.output_proj(out.flatten(-2))
