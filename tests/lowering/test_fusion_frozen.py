"""Rewrites of graphs with frozen weights, in which Inductor has folded constants."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kda_ops
from kda_ops._numerics import RCP_LN2
from tests.support.rewritten import Rewritten, rewritten

H, K, T = 3, 8, 9


class Gate(nn.Module):
    """The gate in plain PyTorch with its own weights, before its cumsum."""

    bound: float | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.bias = nn.Parameter(torch.randn(H * K))

    def rate(self) -> Tensor:
        return self.A_log.exp().unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        z = (x if x.dtype == torch.float64 else x.float()) + self.bias.view(H, K)
        if self.bound is not None:
            g = self.bound * torch.sigmoid(self.rate() * z)
        else:
            g = -self.rate() * F.softplus(z)
        return kda_ops.chunk_cumsum(g, scale=RCP_LN2)


def compiled(**attributes: Any) -> Rewritten:
    model = type("Variant", (Gate,), attributes)().eval()
    return rewritten(model, torch.randn(2, T, H, K, dtype=torch.bfloat16), frozen=True)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_a_folded_rate_is_a_gate(bound: float | None) -> None:
    """`exp(A_log)`, and its negative, are constants then."""
    found = compiled(bound=bound)
    assert found.fired[0] == "plain_gate"
    assert found.refused == []
    assert found.operators in (["gate", "chunk_cumsum"], ["gate_cumsum"])


def negative(self: Gate) -> Tensor:
    return -self.A_log.exp().unsqueeze(-1)


def of_both_signs(self: Gate) -> Tensor:
    return self.A_log.exp().unsqueeze(-1) * torch.tensor([[1.0], [-1.0], [1.0]])


def per_channel(self: Gate) -> Tensor:
    return self.A_log.exp().unsqueeze(-1) + self.bias.view(H, K).abs()


@pytest.mark.parametrize("rate", [negative, of_both_signs, per_channel])
def test_another_rate_is_not(rate: Any) -> None:
    assert compiled(rate=rate).operators == ["chunk_cumsum"]


@pytest.mark.parametrize("rate", [of_both_signs, per_channel])
def test_a_bounded_gate_absorbs_another_rate_into_its_input(rate: Any) -> None:
    assert compiled(rate=rate, bound=-5.0).operators == ["gate", "chunk_cumsum"]


class Convolved(nn.Module):
    """Three projections of one input with a convolution each, of frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(16, n, bias=False) for n in (16, 16, 32))
        self.weights = nn.ParameterList(torch.randn(n, 3) for n in (16, 16, 32))

    def forward(self, x: Tensor, G: Tensor, beta: Tensor) -> Tensor:
        q, k, v = (
            kda_ops.short_conv(F.linear(x, p.weight.to(x.dtype)), w.to(x.dtype)).unflatten(
                -1, (2, -1)
            )
            for p, w in zip(self.projections, self.weights, strict=True)
        )
        return kda_ops.chunk_kda(kda_ops.l2norm(q), kda_ops.l2norm(k), v, G, beta)[0]


def test_slices_of_merged_projections_are_convolved_together() -> None:
    """With frozen weights Inductor merges the three GEMMs into one."""
    inputs = torch.randn(1, T, 16), -torch.rand(1, T, 2, 8), torch.rand(1, T, 2)
    found = rewritten(Convolved().eval(), *inputs, frozen=True)
    assert found.fired == ["separate_convs"]
    assert found.operators == ["short_conv_qkv", "chunk_kda"]
    assert found.copies == 0
