"""When the convolution and the norms of q and k become one operator, and when not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.lowering.graph.matching import VIEWS, Call, value
from kda_ops.lowering.rewrites.framework import Rewrites
from tests.support.rewritten import Rewritten, rewritten

H, K, V, W, T, SLOTS = 2, 8, 24, 4, 7, 4
KEY = H * K
D = 2 * KEY + V


def model(
    normalize: Callable[[Tensor, float], Tensor] = lambda x, eps: kda_ops.l2norm(x, eps=eps),
    *,
    state: str | None = None,
    cut: Callable[[Tensor], Any] = lambda y: y.split([KEY, KEY, V], dim=-1),
    eps: tuple[float, float] = (1e-6, 1e-6),
    wide_keys: bool = False,
    extra: Callable[[Tensor, Tensor], Any] = lambda y, q: None,
) -> Callable[..., Any]:
    """Convolution, split and norms as a model author writes them."""

    def call(x: Tensor, weight: Tensor, conv: Tensor, state_indices: Tensor, cu: Tensor) -> Any:
        paged = (
            {}
            if state is None
            else {"conv_state": conv, "state_indices": state_indices, "layout": state}
        )
        y = kda_ops.short_conv(x, weight, cu_seqlens=cu, **paged)
        q, k, v = cut(y)
        heads = [
            part.unflatten(-1, (-1, width))
            for part, width in ((q, K), (k, 2 * K if wide_keys else K))
        ]
        q, k = (normalize(part, e) for part, e in zip(heads, eps, strict=True))
        return q, k, v.unflatten(-1, (-1, K)) + 1, extra(y, heads[0])

    return call


def compiled(function: Callable[..., Any], layout: str = "SD", dynamic: bool = False) -> Rewritten:
    torch.manual_seed(0)
    shape = (W, D) if layout == "SD" else (D, W)
    inputs = (
        torch.randn(1, T, D, dtype=torch.bfloat16),
        torch.randn(D, W, dtype=torch.bfloat16),
        torch.randn(SLOTS, *shape, dtype=torch.bfloat16),
        torch.tensor([3, 1]),
        torch.tensor([0, 5, 7], dtype=torch.int32),
    )
    axes = {0: 1} if dynamic else False
    return rewritten(function, *inputs, dynamic=axes, written=(2,))


def test_users_of_a_part_know_its_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after the rewrites: a part of one result has become a separate result."""
    apply = Rewrites.apply
    found: list[tuple[bool, bool]] = []

    def checked(self: Rewrites, graph: torch.fx.Graph) -> int:
        apply(self, graph)
        for node in graph.nodes:
            if node.target in VIEWS and Call.of(node.args[0].args[0]) is not None:
                source, view = value(node.args[0]), value(node)
                same_memory = source.untyped_storage()._cdata == view.untyped_storage()._cdata
                found.append((view.is_contiguous(), same_memory))
        return 0

    monkeypatch.setattr(Rewrites, "apply", checked)
    assert compiled(model(state="SD")).fired == ["short_conv_qkv"]
    assert found == [(True, True)]


def slices(y: Tensor) -> tuple[Tensor, ...]:
    return y[..., :KEY], y[..., KEY : 2 * KEY], y[..., 2 * KEY :]


def with_rsqrt(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def with_sqrt_in_fp32(x: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide / torch.sqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cast_twice(x: Tensor, eps: float) -> Tensor:
    root = torch.rsqrt(wide(x).pow(2).sum(-1, keepdim=True) + 1e-6)
    return (wide(x) * root).to(x.dtype)


def root_rounded(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(wide(x).square().sum(-1) + 1e-6).unsqueeze(-1).to(x.dtype)


def with_powers(x: Tensor, eps: float) -> Tensor:
    return x * ((x**2).sum(-1, keepdim=True) + 1e-6) ** -0.5


def with_reciprocal(x: Tensor, eps: float) -> Tensor:
    return (1.0 / torch.sqrt(torch.linalg.vecdot(x, x)[..., None] + 1e-6)) * x


def sum_in_fp32(x: Tensor, eps: float) -> Tensor:
    squares = x.pow(2).sum(-1, keepdim=True, dtype=wide(x).dtype)
    return (x / (squares + 1e-6) ** 0.5).to(x.dtype)


NORMS = [cast_twice, root_rounded, with_powers, with_reciprocal, sum_in_fp32]


@pytest.mark.parametrize("normalize", NORMS)
def test_other_spellings_are_one_operator(normalize: Callable[[Tensor, float], Tensor]) -> None:
    found = compiled(model(normalize))
    assert found.refused == []
    assert found.operators == ["short_conv_qkv"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (model(), "SD"),
        (model(state="SD"), "SD"),
        (model(state="DS", cut=slices), "DS"),
        (model(with_rsqrt, cut=slices), "SD"),
        (model(with_sqrt_in_fp32, state="SD"), "SD"),
    ],
    ids=["plain", "SD", "DS-slices", "rsqrt", "sqrt-fp32"],
)
def test_it_is_one_operator(function: Callable[..., Any], layout: str, dynamic: bool) -> None:
    found = compiled(function, layout, dynamic)
    assert found.refused == []
    assert "short_conv_qkv" in found.fired
    assert found.operators == ["short_conv_qkv"]
    assert found.copies == 0


def other_axis(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-2, keepdim=True) + 1e-6)


def widened(x: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True, dtype=dtype) + 1e-6)


def clamped(x: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (model(eps=(1e-6, 1e-5)), "different eps"),
        (model(wide_keys=True), "different widths"),
        (model(extra=lambda y, q: y), "is returned"),
        (model(extra=lambda y, q: y * 2), "is also used by"),
        (model(extra=lambda y, q: q.exp()), "does not go into l2norm alone"),
    ],
    ids=["eps", "widths", "returned", "used", "raw-q-used"],
)
def test_it_stays_where_the_guard_says_so(function: Callable[..., Any], reason: str) -> None:
    found = compiled(function)
    assert found.operators == ["short_conv", "l2norm", "l2norm"]
    assert [name for name, why in found.refused if reason in why] == ["short_conv_qkv"]


def after_the_root(x: Tensor, eps: float) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def squared_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6)


def over_all(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(dim=None, keepdim=True) + 1e-6)


def of_another(x: Tensor, eps: float) -> Tensor:
    return x.flip(1) * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def product(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x.flip(1)).abs().sum(-1, keepdim=True) + 1e-6)


OTHERS = [other_axis, clamped, after_the_root, squared_norm, over_all, of_another, product]


@pytest.mark.parametrize("normalize", OTHERS)
def test_another_norm_stays(normalize: Callable[[Tensor, float], Tensor]) -> None:
    assert compiled(model(normalize)).operators == ["short_conv"]


def test_the_reason_why_normalize_is_a_different_norm_is_reported() -> None:
    found = compiled(model(clamped))
    reason = "divides by the larger of root and eps, eps belongs below the root"
    assert [name for name, why in found.refused if reason in why] == ["plain_l2norm"] * 2


def test_a_norm_that_widens_stays() -> None:
    found = compiled(model(widened))
    assert found.operators == ["short_conv"]
    reason = ("plain_l2norm", "the norm of torch.bfloat16 is in torch.float32")
    assert found.refused == [reason, reason]


@pytest.mark.parametrize("K", [256, 257])
def test_heads_wider_than_the_kernel_supports_stay(K: int) -> None:
    def function(x: Tensor, weight: Tensor) -> Any:
        q, k, v = kda_ops.short_conv(x, weight).split(K, dim=-1)
        return kda_ops.l2norm(q), kda_ops.l2norm(k), v + 1

    bf16 = {"dtype": torch.bfloat16}
    found = rewritten(function, torch.randn(1, 3, 3 * K, **bf16), torch.randn(3 * K, 4, **bf16))
    assert (found.operators == ["short_conv_qkv"]) == (K == 256)
    assert found.refused == (
        [] if K == 256 else [("short_conv_qkv", "heads of 257 are wider than 256")]
    )


def test_heads_across_tokens_stay() -> None:
    """Three tokens of two heads of 8, regrouped as two heads of 24."""

    def function(x: Tensor, weight: Tensor) -> Any:
        q, k, v = kda_ops.short_conv(x, weight).split(16, dim=-1)
        q, k = (kda_ops.l2norm(part.reshape(1, 2, 24)) for part in (q, k))
        return q, k, v + 1

    found = rewritten(function, torch.randn(1, 3, 48), torch.randn(48, 4))
    assert found.operators == ["short_conv", "l2norm", "l2norm"]
    assert found.refused == [("short_conv_qkv", "the 16 channels of q are not whole heads of 24")]


def test_uneven_parts_stay() -> None:
    function = model(cut=lambda y: y.split([KEY, KEY + K, V - K], dim=-1))
    assert compiled(function).operators == ["short_conv", "l2norm", "l2norm"]
