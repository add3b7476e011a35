"""The cumulative sum of a gate in plain PyTorch, before a chunked recurrence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kda_ops
from kda_ops._numerics import RCP_LN2
from tests.support.fake_cuda import cuda_code, summary
from tests.support.rewritten import rewritten

H, K = 2, 64
Cumsum = Callable[[Tensor], Tensor]


def viewed(g: Tensor) -> Tensor:
    B, T = g.shape[:2]
    return g.view(B, T // 64, 64, H, K).cumsum(2).view(B, T, H, K) * RCP_LN2


def viewed_in_one(g: Tensor) -> Tensor:
    return (g * RCP_LN2).flatten(2).view(-1, 64, H * K).cumsum(1).view(g.shape)


def padded(g: Tensor) -> Tensor:
    B, T = g.shape[:2]
    g = F.pad(g, (0, 0, 0, 0, 0, -T % 64)).view(B, -1, 64, H, K)
    return g.cumsum(2).flatten(1, 2)[:, :T] * RCP_LN2


def scaled_in_chunks(g: Tensor) -> Tensor:
    B, T = g.shape[:2]
    return (g.view(B, T // 64, 64, H, K).cumsum(2) * RCP_LN2).view(B, T, H, K)


def chunked(cumsum: Cumsum) -> Callable[..., Any]:
    """A chunked recurrence with its gate and the sums of it in plain PyTorch."""

    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A: Tensor) -> Any:
        wide = x if x.dtype == torch.float64 else x.float()
        G = cumsum(-A.exp()[:, None] * F.softplus(wide))
        return kda_ops.chunk_kda(q, k, v, G.to(wide.dtype), torch.sigmoid(beta))[0]

    return function


def inputs(T: int, batch: int = 1) -> list[Tensor]:
    q, k, v, x = (torch.randn(batch, T, H, K, dtype=torch.bfloat16) for _ in range(4))
    q, k = (F.normalize(y.float(), dim=-1).bfloat16() for y in (q, k))
    return [q, k, v, x, torch.randn(batch, T, H), torch.randn(H)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("cumsum", "T", "batch"),
    [(viewed, 192, 2), (viewed_in_one, 128, 1), (padded, 200, 2), (scaled_in_chunks, 128, 2)],
)
def test_it_is_the_operator(cumsum: Cumsum, T: int, batch: int, dynamic: bool) -> None:
    lengths = dict.fromkeys(range(5), 1) if dynamic else False
    found = rewritten(chunked(cumsum), *inputs(T, batch), dynamic=lengths)
    if cumsum is scaled_in_chunks and dynamic:
        assert found.operators == ["chunk_kda"]
        assert found.refused == [("plain_cumsum", "no node of the graph has the size (s27//64)")]
        return
    assert found.operators == ["chunk_kda_gated"]
    assert found.fired[:2] == ["plain_cumsum", "plain_gate"]
    assert found.refused == []


@pytest.mark.parametrize("cumsum", [viewed, padded])
def test_no_gate_in_memory(cumsum: Cumsum) -> None:
    _, (source,) = cuda_code(chunked(cumsum), *inputs(192))
    assert summary(source).launches == ["chunk_gated_prepare_kernel", "chunk_scan_kernel"]


def other_chunk(g: Tensor) -> Tensor:
    return g.view(g.shape[0], -1, 32, H, K).cumsum(2).view(g.shape) * RCP_LN2


def whole_length(g: Tensor) -> Tensor:
    return g.cumsum(1) * RCP_LN2


def over_heads(g: Tensor) -> Tensor:
    return g.view(g.shape[0], -1, 64, H, K).cumsum(3).view(g.shape) * 0.01


def across_entries(g: Tensor) -> Tensor:
    return g.view(-1, 64, H, K).cumsum(1).view(g.shape) * RCP_LN2


def padded_with_ones(g: Tensor) -> Tensor:
    T = g.shape[1]
    g = F.pad(g, (0, 0, 0, 0, 0, -T % 64), value=1.0).view(g.shape[0], -1, 64, H, K)
    return g.cumsum(2).flatten(1, 2)[:, :T] * RCP_LN2


def padded_in_front(g: Tensor) -> Tensor:
    T = g.shape[1]
    g = F.pad(g, (0, 0, 0, 0, -T % 64, 0)).view(g.shape[0], -1, 64, H, K)
    return g.cumsum(2).flatten(1, 2)[:, :T] * RCP_LN2


def cut_in_front(g: Tensor) -> Tensor:
    T = g.shape[1]
    g = F.pad(g, (0, 0, 0, 0, 0, -T % 64)).view(g.shape[0], -1, 64, H, K)
    return g.cumsum(2).flatten(1, 2)[:, -T % 64 :] * RCP_LN2


def cut_in_between(g: Tensor) -> Tensor:
    """The sums of the second chunk on."""
    B, T = g.shape[:2]
    g = F.pad(g, (0, 0, 0, 0, 0, 192 - T)).view(B, 3, 64, H, K)
    return g.cumsum(2)[:, 1:].flatten(1, 2)[:, :T] * RCP_LN2


def of_more(g: Tensor) -> Tensor:
    """The first half of the tokens summed."""
    twice = torch.cat([g, g], dim=1)
    return twice.view(1, -1, 64, H, K).cumsum(2).flatten(1, 2)[:, : g.shape[1]] * RCP_LN2


def rounded(g: Tensor) -> Tensor:
    narrow = g if g.dtype == torch.float64 else g.half()
    return narrow.view(g.shape[0], -1, 64, H, K).cumsum(2).view(g.shape).to(g.dtype)


@pytest.mark.parametrize(
    ("cumsum", "T", "batch", "reason"),
    [
        (other_chunk, 128, 1, "sums over 32 tokens, not 64"),
        (whole_length, 128, 1, "sums over 128 tokens, not 64"),
        (over_heads, 128, 1, "is not along the tokens"),
        (across_entries, 96, 2, "may reach into the next batch entry"),
        (padded_with_ones, 100, 1, "does not pad the tokens alone"),
        (padded_in_front, 100, 1, "does not pad the tokens alone"),
        (cut_in_front, 100, 1, "does not pad the tokens alone"),
        (cut_in_between, 100, 1, "cuts the sums"),
        (of_more, 128, 1, "has another length"),
        (rounded, 128, 1, "the sum of torch.float16 is in torch.float16"),
    ],
)
def test_it_is_left_alone(cumsum: Cumsum, T: int, batch: int, reason: str) -> None:
    found = rewritten(chunked(cumsum), *inputs(T, batch))
    assert "plain_cumsum" not in found.fired
    (refused,) = [why for name, why in found.refused if name == "plain_cumsum"]
    assert reason in refused


def test_other_users_of_the_sums_keep_them() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A: Tensor) -> Any:
        g = -A.exp()[:, None] * F.softplus(x if x.dtype == torch.float64 else x.float())
        sums = g.view(1, -1, 64, H, K).cumsum(2)
        return kda_ops.chunk_kda(q, k, v, sums.view(g.shape), torch.sigmoid(beta))[0], sums[
            :, :, -1
        ]

    assert "plain_cumsum" not in rewritten(function, *inputs(128)).fired


def test_other_sums_stay() -> None:
    """Those of a model around a layer."""

    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A: Tensor) -> Any:
        sums = x.view(1, -1, 64, H, K).cumsum(2).view(x.shape)
        return kda_ops.l2norm(sums)

    found = rewritten(function, *inputs(128))
    assert found.fired == []
    assert found.refused == []
