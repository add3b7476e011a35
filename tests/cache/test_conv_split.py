"""conv_split: uneven parts, copies instead of views, no copy when compiled."""

from typing import Any

import pytest
import torch

from kda_ops import conv_split, short_conv_update
from kda_ops._cases import paged_conv_state
from tests.support.fake_cuda import cuda_code, summary

CPU = torch.device("cpu")
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])
shapes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def state_of(layout: str, D: int = 40, L: int = 3, slots: int = 5) -> torch.Tensor:
    return paged_conv_state(slots, L, D, layout, torch.float32, CPU)


def channels(state: torch.Tensor, layout: str) -> torch.Tensor:
    """`[slots, L, D]` from either layout."""
    return state if layout == "SD" else state.transpose(1, 2)


@layouts
def test_parts_are_the_channels_in_order(layout: str) -> None:
    state = state_of(layout)
    q, k, v = conv_split(state, (8, 8, 24), layout=layout)
    rows = channels(state, layout)
    for part, channel in ((q, slice(0, 8)), (k, slice(8, 16)), (v, slice(16, 40))):
        assert part.is_contiguous()
        assert torch.equal(channels(part, layout), rows[..., channel])


@layouts
def test_parts_are_copies(layout: str) -> None:
    state = state_of(layout)
    parts = [*conv_split(state, (8, 32), layout=layout), *conv_split(state, (40,), layout=layout)]
    before = [part.clone() for part in parts]
    state.fill_(0)
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part, old)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sizes": (8, 8, 8)}, r"sizes must add up to 40, .* layout SD, got \[8, 8, 8\] = 24"),
        ({"sizes": (48, -8)}, r"sizes must not be negative, got \[48, -8\]"),
        ({"layout": "DS"}, r"sizes must add up to 3, .* layout DS, got \[8, 8, 24\] = 40"),
        ({"layout": "sd"}, r"layout must be one of SD, DS, auto, got 'sd'"),
        ({"conv_state": torch.zeros(3, 40)}, r"conv_state must have 3 dimensions, got .*\(3, 40\)"),
        (
            {"conv_state": torch.zeros(2, 3, 40, dtype=torch.int32)},
            r"conv_state must have dtype .*float32, float64, got int32",
        ),
    ],
)
def test_errors(change: dict[str, Any], match: str) -> None:
    arguments = {"conv_state": state_of("SD"), "sizes": (8, 8, 24), "layout": "SD"} | change
    with pytest.raises(ValueError, match=match):
        conv_split(**arguments)


def split_then_update(state: Any, x: Any, weight: Any, state_indices: Any, layout: str) -> Any:
    """Reads parts of the state before and after it is written."""
    before = conv_split(state, (8, 32), layout=layout)
    y = short_conv_update(x, state, weight, state_indices=state_indices, layout=layout)
    after = conv_split(state, (8, 32), layout=layout)
    return y, before[0] + 1, before[1], after[0] * 2, after[1]


@layouts
@shapes
def test_state_written_after_the_split_in_one_graph(layout: str, dynamic: bool) -> None:
    x, weight, state_indices = torch.randn(3, 40), torch.randn(40, 4), torch.tensor([4, 1, 2])
    eager_state = state_of(layout)
    state = eager_state.clone()
    expected = split_then_update(eager_state, x, weight, state_indices, layout)
    compiled = torch.compile(split_then_update, fullgraph=True, dynamic=dynamic)
    found = compiled(state, x, weight, state_indices, layout)
    assert torch.equal(state, eager_state)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    assert not torch.equal(found[2], found[4])


@layouts
@shapes
def test_costs_no_copy_on_a_gpu(layout: str, dynamic: bool) -> None:
    def consume(state: torch.Tensor) -> torch.Tensor:
        q, k = conv_split(state, (20, 20), layout=layout)
        return q * k

    _, (source,) = cuda_code(consume, state_of(layout), dynamic=dynamic)
    found = summary(source)
    assert len(found.launches) == 1
    assert found.externs == []
    assert found.allocations == 1
