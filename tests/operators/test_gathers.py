"""What lies side by side is read where it lies: no gather by index where sequences are dense and
pages follow one another, in eager calls and in compiled ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.cache.batch import KDABatch
from kda_ops.conv.short_conv.cases import short_conv_inputs
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.delta_rule.recurrent_kda.cases import recurrent_inputs
from kda_ops.nn.layer import KimiDeltaAttention
from tests.support.operators import public_function

CPU, FP32 = torch.device("cpu"), torch.float32
KINDS = ("index", "gather", "scatter", "take", "masked_select", "embedding")
# what index_put calls in turn, and a branch on a value
INSIDE = ("aten::_index_put_impl_", "aten::is_nonzero")
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])
counts = pytest.mark.parametrize("count", [1, 8])


def gathers(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """What a call gathers or scatters, inside of operators too, sorted."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        function(*args, **kwargs)
    names = [event.name for event in profile.events()]
    assert any(name.startswith("aten::") for name in names)
    return sorted(
        name
        for name in names
        if name.startswith("aten::") and name not in INSIDE and any(kind in name for kind in KINDS)
    )


def in_a_row(inputs: dict[str, Any], name: str, count: int, dtype: Any = torch.int32) -> Any:
    """The arguments with slots 1, 2, 3 ..."""
    return inputs | {name: torch.arange(1, count + 1, dtype=dtype)}


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "whole": {"shape": (1, 40)},
    "without-a-batch": {"shape": (40,)},
    "batch": {"shape": (3, 20)},
    "single-tokens": {"shape": (3, 1)},
    "equal-lengths": {"shape": (1, 40), "lengths": (20, 20)},
    "ragged": {"shape": (1, 60), "lengths": (9, 20, 25)},
    "bf16": {"shape": (3, 20), "dtype": torch.bfloat16},
}


def conv_inputs(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = FP32, **options: Any
) -> dict[str, Any]:
    if name == "short_conv":
        return short_conv_inputs((*shape, 48), dtype=dtype, **options, device=CPU)
    batch, tokens = (1, *shape)[-2:]
    return short_conv_qkv_inputs(batch, tokens, 2, 8, 16, dtype, **options, device=CPU)


@pytest.mark.parametrize("name", ["short_conv", "short_conv_qkv"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(name: str, options: dict[str, Any]) -> None:
    assert gathers(public_function(name), **conv_inputs(name, **options)) == []


@layouts
@pytest.mark.parametrize("name", ["short_conv", "short_conv_qkv"])
@pytest.mark.parametrize("initial", [None, (1, 0, 1)], ids=["fresh", "continued"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_convolutions_from_pages_in_a_row(
    name: str, layout: str, initial: tuple[int, ...] | None, tokens: int
) -> None:
    pages: dict[str, Any] = {"layout": layout, "state_indices": (1, 2, 3), "initial": initial}
    inputs = conv_inputs(name, (3, tokens), **pages)
    assert gathers(public_function(name), **inputs) == []


@layouts
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_convolution_of_new_tokens(layout: str, tokens: int) -> None:
    inputs = short_conv_inputs((3, tokens, 16), dtype=FP32, layout=layout, num_spec=2, device=CPU)
    inputs |= {"state_indices": torch.tensor([1, 2, 3])}
    assert gathers(kda_ops.short_conv_update, **inputs) == []


@counts
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("state_dtype", [FP32, torch.bfloat16])
def test_the_recurrence(count: int, tokens: int, state_dtype: torch.dtype) -> None:
    inputs = recurrent_inputs(count, tokens, 2, 4, 8, 8, FP32, state_dtype=state_dtype, device=CPU)
    inputs = in_a_row(inputs, "state_indices", count)
    assert gathers(kda_ops.recurrent_kda, **inputs) == []


@layouts
@counts
@pytest.mark.parametrize("unpack", [False, True], ids=["packed", "unpacked"])
def test_a_decode_step(count: int, layout: str, unpack: bool) -> None:
    inputs = kda_decode_inputs(count, 2, 2, 8, 8, layout, FP32, unpack=unpack, device=CPU)
    inputs = in_a_row(inputs, "state_indices", count)
    assert gathers(kda_ops.fused.kda_decode, **inputs) == []


@layouts
@pytest.mark.parametrize("tokens", [1, 4])
def test_scattered_pages_are_gathered_once(layout: str, tokens: int) -> None:
    """Each of the two states is read and written once, however many tokens there are."""
    options: dict[str, Any] = {"lengths": (tokens,) * 3, "room": tokens - 1}
    inputs = kda_decode_inputs(3, 2, 2, 8, 8, layout, FP32, **options, device=CPU)
    inputs["state_indices"] = torch.tensor([4, 1, 2])
    expected = ["aten::index", "aten::index", "aten::index_put_", "aten::index_put_"]
    assert gathers(kda_ops.fused.kda_decode, **inputs) == expected


def test_gathers_are_seen() -> None:
    """Many short sequences of different lengths are convolved by index."""
    inputs = conv_inputs("short_conv", (1, 10), lengths=(1, 2, 3, 4))
    assert "aten::index" in gathers(kda_ops.short_conv, **inputs)


def layer() -> KimiDeltaAttention:
    return KimiDeltaAttention(64, 32, 2).eval()


def layer_inputs(kind: str, module: KimiDeltaAttention) -> dict[str, Any]:
    if kind == "whole":
        return {"hidden_states": torch.randn(1, 130, 64)}
    state = module.state_spec().allocate(4)
    if kind == "pages":
        rows, batch = 140, KDABatch.prefill([70, 70], [1, 2], has_initial_state=[True, False])
    else:
        rows, batch = 3, KDABatch.decode([1, 2, 3])
    return {"hidden_states": torch.randn(1, rows, 64), "state": state, "batch": batch}


def test_an_eager_decode_step_of_a_layer() -> None:
    module = layer()
    assert gathers(module, **layer_inputs("decode", module)) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("whole", []), ("pages", ["aten::index"]), ("decode", [])],
    ids=["whole", "pages", "decode"],
)
def test_a_compiled_layer(kind: str, expected: list[str]) -> None:
    """Neither its generated loops nor the operators that it calls, but for the check of a chunk
    table, which makes it anew.
    """
    from torch._inductor.utils import run_and_get_code

    module = layer()
    inputs = layer_inputs(kind, module)
    fast = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        _, (source,) = run_and_get_code(fast, **inputs)
    assert gathers(fast, **inputs) == expected
    assert [
        kind for kind in ("aten.index", "aten.gather", "aten.embedding") if kind in source
    ] == []


def test_the_numbers_are_those_of_scattered_pages() -> None:
    """Slices of pages in a row, and pages by index, are the same computation."""
    inputs = kda_decode_inputs(3, 2, 2, 8, 8, "SD", FP32, device=CPU)
    inputs = in_a_row(inputs, "state_indices", 3)
    order = torch.tensor([0, 3, 1, 2, *range(4, len(inputs["state"]))])
    other = {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    for name in ("conv_state", "state"):
        other[name][order] = inputs[name]
    other["state_indices"] = order[1:4]
    o, scattered = kda_ops.fused.kda_decode(**inputs), kda_ops.fused.kda_decode(**other)
    assert torch.equal(o, scattered)
    for name in ("conv_state", "state"):
        assert torch.equal(inputs[name], other[name][order])
