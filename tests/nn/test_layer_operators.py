"""Which operators a layer is made of: eager code calls the fused ones, traced code has the small
ones that rewrites look for. Both compute the same.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.nn.test_layer import LAYOUTS, VARIANTS, assert_same, in_fp64, make_layer, make_state
from tests.nn.test_memory import Recorded
from tests.support.as_traced import as_traced

FP64 = torch.float64
FUSED_PREFILL = ["short_conv", "chunk_kda_gated", "rms_norm_gated"]
SMALL_DECODE = ["short_conv_update", "l2norm", "l2norm", "gate", "recurrent_kda", "rms_norm_gated"]
STEPS: dict[str, dict[str, Any]] = {
    "decode": {"decodes": [1, 1], "slots": [3, 5]},
    "speculative": {"decodes": [3, 1], "slots": [[3, 4, 6], [5, 7, 8]], "num_spec": 2},
    "prefill": {"prompts": [5, 70], "slots": [3, 5]},
    "mixed": {"decodes": [1], "prompts": [4, 3], "slots": [3, 5, 2]},
}


def batch_of(decodes: Any = (), prompts: Any = (), slots: Any = (), num_spec: int = 0) -> KDABatch:
    """With 5 rows of padding, and prompts that continue."""
    accepted = [1 + i for i in range(len(decodes))] if num_spec else None
    return KDABatch.mixed(
        decodes,
        prompts,
        slots,
        has_initial_state=[True] * len(prompts),
        num_accepted=accepted,
        num_tokens=sum(decodes) + sum(prompts) + 5,
    )


def operators(layer: KimiDeltaAttention, *args: Any, **kwargs: Any) -> list[str]:
    with Recorded() as recorded:
        layer(*args, **kwargs)
    return recorded.operators


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_sequences(variant: dict[str, Any]) -> None:
    layer = make_layer(FP64, **variant)
    x = torch.randn(1, 75, layer.hidden_size, dtype=FP64)
    offsets = torch.tensor([0, 1, 1, 70])
    found = layer(x, cu_seqlens=offsets)
    expected_operators = FUSED_PREFILL if layer.use_short_conv else FUSED_PREFILL[1:]
    assert operators(layer, x, cu_seqlens=offsets) == expected_operators
    same = as_traced(layer)(x, cu_seqlens=offsets)
    assert_same(found, same)
    small = as_traced(operators)(layer, x, cu_seqlens=offsets)
    assert {"chunk_kda", "gate_cumsum", "l2norm"} <= set(small)
    assert "chunk_kda_gated" not in small


def stepped(layer: KimiDeltaAttention, step: dict[str, Any], x: Tensor) -> list[Tensor | None]:
    """The output and both states of a step in fp64, from states that are the same every time."""
    torch.manual_seed(7)
    conv, recurrent = make_state(layer, num_spec=step.get("num_spec", 0))
    state = (None if conv is None else conv.double(), recurrent.double())
    return [in_fp64(layer)(x, state=state, batch=batch_of(**step)), *state]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("name", ["grouped-wide-values", "negative-eigenvalues", "no-conv"])
def test_steps(name: str, step: dict[str, Any], layout: str) -> None:
    layer = make_layer(**{**VARIANTS[name], "conv_layout": layout})
    x = torch.randn(1, batch_of(**step).num_tokens, layer.hidden_size, dtype=FP64)
    found = stepped(layer, step, x)
    for one, other in zip(found, as_traced(stepped)(layer, step, x), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_same(one, other)


def test_a_decode_step_is_one_operator() -> None:
    layer = make_layer()
    x, batch = torch.randn(1, 2, layer.hidden_size), KDABatch.decode([3, 5])
    state = make_state(layer)
    assert operators(layer, x, state=state, batch=batch) == ["kda_decode"]
    assert as_traced(operators)(layer, x, state=state, batch=batch) == SMALL_DECODE


def test_a_decode_step_stays_differentiable_behind_the_recurrence() -> None:
    """Of what is used after the states are written."""
    layer = make_layer()
    layer.o_norm_weight.requires_grad_()
    x, state = torch.randn(1, 2, layer.hidden_size), make_state(layer)
    batch = KDABatch.decode([3, 5])
    assert operators(layer, x, state=state, batch=batch) == SMALL_DECODE
    (gradient,) = torch.autograd.grad(
        layer(x, state=state, batch=batch).square().sum(), layer.o_norm_weight
    )
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert operators(layer, x, state=state, batch=batch) == ["kda_decode"]


def test_more_tokens_than_the_kernel_takes() -> None:
    layer = make_layer()
    state = make_state(layer, num_spec=8)
    x, slots = torch.randn(1, 9, layer.hidden_size), [list(range(1, 10))]
    batch = KDABatch.decode(slots, lengths=[9], num_accepted=[1])
    assert operators(layer, x, state=state, batch=batch) == SMALL_DECODE
