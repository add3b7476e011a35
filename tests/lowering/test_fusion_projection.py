"""When concatenated projections are written into one buffer, and when not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.launches import launches
from tests.support.rewritten import rewritten

HIDDEN, WIDTHS, T = 16, (8, 8, 24), 5
D = sum(WIDTHS)


def side_by_side(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    return torch.cat([torch.nn.functional.linear(x, p) for p in projections[:3]], dim=-1)


def model(pack: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, *projections: Tensor) -> Any:
        packed = pack(x, weight, *projections)
        packed, *others = packed if isinstance(packed, tuple) else (packed,)
        return kda_ops.short_conv(packed, weight), *others

    return call


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16}
    projections = [torch.randn(n, HIDDEN, **bf16) for n in WIDTHS]
    biases = [torch.randn(n, **bf16) for n in WIDTHS]
    return [torch.randn(1, T, HIDDEN, **bf16), torch.randn(D, 4, **bf16), *projections, *biases]


def with_biases(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    pairs = zip(projections[:3], projections[3:], strict=True)
    return torch.cat([torch.nn.functional.linear(x, p, b) for p, b in pairs], dim=-1)


def slices(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, torch.cat(projections[:3]))
    return torch.cat([y[..., :8], y[..., 8:16], y[..., 16:]], dim=-1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pack", [side_by_side, with_biases, slices])
def test_nothing_is_copied(pack: Callable[..., Any], dynamic: bool) -> None:
    found = rewritten(model(pack), *inputs(), dynamic={0: 1} if dynamic else False)
    assert found.fired == ["packed_projection"]
    assert found.refused == []


@pytest.mark.parametrize("pack", [side_by_side, with_biases])
def test_each_gemm_writes_its_part(pack: Callable[..., Any]) -> None:
    found = launches(model(pack), *inputs())
    assert found.launches == ["short_conv_kernel"]
    assert found.allocations == 2, "the products and the result"


def other_order(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    q, k, v = torch.nn.functional.linear(x, torch.cat(projections[:3])).split(WIDTHS, dim=-1)
    return torch.cat([k, q, v], dim=-1)


def activated(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    return torch.cat([torch.nn.functional.linear(x, p).relu() for p in projections[:3]], dim=-1)


def used(x: Tensor, weight: Tensor, *projections: Tensor) -> Any:
    parts = [torch.nn.functional.linear(x, p) for p in projections[:3]]
    return torch.cat(parts, dim=-1), parts[0].exp()


def regrouped(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, torch.cat(projections[:3]))
    return torch.cat([y.view(1, 2 * T, D // 2)[:, :T], y.view(1, 2 * T, D // 2)[:, T:]], dim=-1)


def flat(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    return torch.cat([x[0] @ p.T for p in projections[:3]], dim=-1)


def product_used(x: Tensor, weight: Tensor, *projections: Tensor) -> Any:
    products = [x[0] @ p.T for p in projections[:3]]
    return torch.cat([y[None] for y in products], dim=-1), products[0].exp()


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (other_order, "is not a matrix product"),
        (activated, "is not a matrix product"),
        (used, "is also used by exp"),
        (regrouped, "is not a matrix product"),
        (flat, "no view in between"),
        (product_used, "has other uses than the convolution"),
    ],
)
def test_it_stays_where_the_guard_says_so(pack: Callable[..., Any], reason: str) -> None:
    found = rewritten(model(pack), *inputs())
    assert found.fired == []
    assert [why for name, why in found.refused if name == "packed_projection"]
    assert reason in found.refused[0][1]


def cut_products(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    parts = [torch.nn.functional.linear(x, p).view(1, 2 * T, -1) for p in projections]
    return kda_ops.short_conv(torch.cat(parts, dim=-1), weight)


def cut_slices(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    parts = torch.nn.functional.linear(x, torch.cat(projections)).split(4, dim=-1)
    parts = [part.reshape(1, 2 * T, 2) for part in parts]
    return kda_ops.short_conv(torch.cat(parts, dim=-1), weight)


@pytest.mark.parametrize("function", [cut_products, cut_slices])
def test_slices_along_channels_stay(function: Callable[..., Any]) -> None:
    """The rows of the concatenation are halves of the GEMM's rows."""
    weights = torch.randn(6, 4), *(torch.randn(4, HIDDEN) for _ in range(3))
    found = rewritten(function, torch.randn(1, T, HIDDEN), *weights)
    assert found.fired == []
    assert "is cut along its channels" in found.refused[0][1]


def test_other_concatenations_are_left_alone() -> None:
    def call(x: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
        return side_by_side(x, weight, *projections).exp() + kda_ops.l2norm(x).sum()

    found = rewritten(call, *inputs())
    assert (found.fired, found.refused) == ([], [])
