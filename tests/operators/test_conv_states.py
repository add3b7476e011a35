"""States of the convolutions as values: pieces of a sequence are the whole, gradients included."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import short_conv
from kda_ops.fused import short_conv_qkv

D, W, K = 12, 4, 2
QKV: dict[str, Any] = {"key_dim": 4, "head_dim": K}
CUTS = (0, 2, 2, 3, 9, 20)  # pieces of more and of fewer tokens than a state has, and of none
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])


def one(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> list[Any]:
    found = short_conv(x, weight, bias, **how)
    return [*found] if isinstance(found, tuple) else [found]


def packed(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> list[Any]:
    return [*short_conv_qkv(x, weight, bias, **QKV, **how)]


def unpacked(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> list[Any]:
    """Three tensors of everything; a state is one tensor outside."""
    axis = 2 if how["layout"] == "SD" else 1
    state, sizes = how.pop("initial_state", None), [4, 4, 4]
    if state is not None:
        how["initial_state"] = state.split(sizes, axis)
    parts = (x.split(sizes, -1), weight.split(sizes), bias.split(sizes))
    found = short_conv_qkv(*parts, **QKV, **how)
    if how.get("output_final_state"):
        found = (*found[:3], torch.cat(found[3], axis))
    return [*found]


calls = pytest.mark.parametrize("call", [one, packed, unpacked], ids=["one", "packed", "unpacked"])


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    values = [torch.randn(s, dtype=dtype) for s in ((*shape, D), (D, W), (D,))]
    return [x.requires_grad_() for x in values]


def gradients(outputs: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    total = torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, given))


@layouts
@calls
def test_pieces_are_the_whole(call: Callable[..., list[Tensor]], layout: str) -> None:
    """With gradients through every state."""
    given = inputs(2, CUTS[-1])
    x, weight, bias = given
    how: dict[str, Any] = {"layout": layout, "output_final_state": True}
    whole = call(x, weight, bias, **how)
    state, pieces = None, []
    for start, stop in itertools.pairwise(CUTS):
        *outputs, state = call(x[:, start:stop], weight, bias, initial_state=state, **how)
        pieces.append(outputs)
    joined = [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]
    results = zip([*joined, state], whole, strict=True)
    for found, expected in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pairs = zip(gradients([*joined, state], given), gradients(whole, given), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@layouts
@calls
def test_packed_sequences_are_separate_ones(call: Callable[..., list[Tensor]], layout: str) -> None:
    """Some of them empty or short; tokens past the last one are not read."""
    given = inputs(1, CUTS[-1])
    x, weight, bias = given
    shape = (len(CUTS) - 1, W - 1, D)
    state = torch.randn(shape if layout == "SD" else (shape[0], D, W - 1), dtype=x.dtype)
    given.append(state.requires_grad_())
    how: dict[str, Any] = {"layout": layout, "output_final_state": True}
    behind = torch.full((1, 3, D), torch.nan, dtype=x.dtype)
    ragged = call(
        torch.cat([x, behind], 1), weight, bias, initial_state=state,
        cu_seqlens=torch.tensor(CUTS, dtype=torch.int32), **how,
    )  # fmt: skip
    separate = [
        call(x[:, start:stop], weight, bias, initial_state=state[n : n + 1], **how)
        for n, (start, stop) in enumerate(itertools.pairwise(CUTS))
    ]
    *expected, final = zip(*separate, strict=True)
    whole = [*[torch.cat(parts, 1) for parts in expected], torch.cat(final)]
    kept = [y[:, : CUTS[-1]] for y in ragged[:-1]]
    for found, exact in zip([*kept, ragged[-1]], whole, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    assert all(bool((y[:, CUTS[-1] :] == 0).all()) for y in ragged[:-1])
    found = gradients([*kept, ragged[-1]], given)
    for gradient, exact in zip(found, gradients(whole, given), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)


@layouts
def test_equal_to_pages(layout: str) -> None:
    x, weight, bias = (y.detach() for y in inputs(2, 7, dtype=torch.float32))
    state = torch.randn((2, W - 1, D) if layout == "SD" else (2, D, W - 1))
    y, final = one(x, weight, bias, initial_state=state, output_final_state=True, layout=layout)
    known = torch.ones(2, dtype=torch.bool)
    page = state.clone()
    paged = short_conv(x, weight, bias, conv_state=page, has_initial_state=known, layout=layout)
    torch.testing.assert_close(y, paged)
    assert torch.equal(final, page)


@pytest.mark.parametrize("ragged", [False, True])
def test_compiled(ragged: bool) -> None:
    """One graph each way."""
    given = inputs(1, 9, dtype=torch.float32)
    N = 2 if ragged else 1
    given.append(torch.randn(N, W - 1, D, requires_grad=True))
    offsets = torch.tensor([0, 2, 9], dtype=torch.int32) if ragged else None

    def call(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_conv(
            x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=offsets,
            layout="SD",
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*given), call(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients([*found], given), gradients([*expected], given))


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            {"initial_state": torch.zeros(1, W - 1, D)},
            r"initial_state must have shape \[2, 3, 12\]",
        ),
        ({"initial_state": torch.zeros(2, W, D)}, r"initial_state must have shape \[2, 3, 12\]"),
        (
            {"initial_state": torch.zeros(2, W - 1, D), "conv_state": torch.zeros(2, 3, D)},
            "initial_state must not come with conv_state",
        ),
        (
            {"output_final_state": True, "conv_state": torch.zeros(2, 3, D)},
            "output_final_state must not come with conv_state",
        ),
        (
            {"initial_state": torch.zeros(2, W - 1, D, dtype=torch.int32)},
            "initial_state must have dtype",
        ),
    ],
)
def test_errors(how: dict[str, Any], match: str) -> None:
    x, weight, bias = (y.detach() for y in inputs(2, 7, dtype=torch.float32))
    for call in (one, packed):
        with pytest.raises(ValueError, match=match):
            call(x, weight, bias, layout="SD", **how)


def test_states_of_parts_are_parts() -> None:
    x, weight, bias = (y.detach() for y in inputs(2, 7, dtype=torch.float32))
    parts = (x.split(4, -1), weight.split(4), bias.split(4))
    with pytest.raises(ValueError, match="initial_state must be three tensors"):
        short_conv_qkv(*parts, **QKV, initial_state=torch.zeros(2, W - 1, D), layout="SD")
