"""Arguments of the wrong type: a `ValueError` names the argument before anything is written."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kda_ops
from kda_ops._cases import Case
from kda_ops.cache.align import before_forward
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.varlen import prepare_chunk_indices
from tests.support.operators import NAMES, cases, public_function
from tests.support.oracle import copy_inputs

CPU = torch.device("cpu")


def wrong_values(value: Any) -> list[tuple[Any, str]]:
    """Values of other types, with the expected errors."""
    if isinstance(value, Tensor):
        return [(1.5, "a tensor, got float")]
    if isinstance(value, tuple) and isinstance(value[0], Tensor):
        return [((value[0], value[1].tolist(), value[2]), "three tensors")]
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [(value + 0.0, "an integer, got"), (str(value), "an integer, got")]
    if isinstance(value, float):
        return [(str(value), "(a number|1 or 2), got"), (1j, "(a number|1 or 2), got")]
    return []


def arguments() -> Iterator[Any]:
    """Every argument of every operator, in the first case that has it."""
    for name in NAMES:
        seen: set[tuple[str, type]] = set()
        for case in cases(name):
            for argument, value in case.make(CPU).items():
                if (argument, type(value)) not in seen and wrong_values(value):
                    yield pytest.param(name, case, argument, id=f"{name}-{case.name}-{argument}")
                seen.add((argument, type(value)))


@pytest.mark.parametrize(("name", "case", "argument"), list(arguments()))
def test_operators(name: str, case: Case, argument: str) -> None:
    inputs = case.make(CPU)
    before = copy_inputs(inputs)
    for value, expected in wrong_values(inputs[argument]):
        with pytest.raises(ValueError, match=f"^{argument} must be {expected}"):
            public_function(name)(**{**inputs, argument: value})
    for written in case.mutated:
        for x, old in zip(tree_leaves(inputs[written]), tree_leaves(before[written]), strict=True):
            assert torch.equal(x.nan_to_num(), old.nan_to_num())


def no_axes(x: Any) -> Any:
    return tuple(map(no_axes, x)) if isinstance(x, tuple) else torch.zeros((), dtype=x.dtype)


@pytest.mark.parametrize("unpacked", [False, True], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", ["kda_decode", "short_conv_qkv"])
def test_convolution_arguments_without_axes(name: str, unpacked: bool) -> None:
    case = next(c for c in cases(name) if isinstance(c.make(CPU)["x"], tuple) == unpacked)
    for argument in ("x", "weight"):
        inputs = case.make(CPU)
        inputs[argument] = no_axes(inputs[argument])
        with pytest.raises(
            ValueError, match=rf"^{argument} must have .* dimensions, got shape \(\)"
        ):
            public_function(name)(**inputs)


@pytest.mark.parametrize("name", ["kda_decode", "short_conv_qkv"])
def test_parts_on_different_devices(name: str) -> None:
    inputs = next(x for x in (c.make(CPU) for c in cases(name)) if isinstance(x["x"], tuple))
    q, k, v = inputs["x"]
    with pytest.raises(ValueError, match="x of k must be on cpu like x of q, got meta"):
        public_function(name)(**{**inputs, "x": (q, k.to("meta"), v)})


@pytest.mark.parametrize("sizes", [3, None, torch.tensor([2, 4])])
def test_sizes_of_a_split(sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes must be a list of integers, got"):
        kda_ops.conv_split(torch.zeros(2, 3, 6), sizes, layout="SD")


COUNTS = dict.fromkeys(("num_computed", "num_scheduled", "num_accepted"), torch.ones(1).int())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare_chunk_indices([0, 5], 5), "cu_seqlens must be a tensor, got list"),
        (
            lambda: prepare_chunk_indices(torch.tensor([0, 5]), 5.0),
            "total_tokens must be an integer, got 5.0",
        ),
        (lambda: KDABatch.prefill([2.5], [1]), "lengths must be an integer, got 2.5"),
        (
            lambda: KDABatch.prefill([2], [1.5]),
            "state_indices must have dtype int32, int64, got float32",
        ),
        (
            lambda: KDABatch.prefill([2, 2], [[1], [2, 3]]),
            "state_indices must be lists of integers, got",
        ),
        (lambda: KDABatch.decode([[1]], num_accepted=["1"]), "num_accepted must be lists of integ"),
        (lambda: KDABatch.decode([1], num_tokens=1.0), "num_tokens must be an integer, got 1.0"),
        (lambda: KimiDeltaAttention(64.0), "hidden_size must be an integer, got 64.0"),
        (lambda: KimiDeltaAttention(64, expand_v="1"), "expand_v must be a number, got '1'"),
        (lambda: KimiDeltaAttention(64, expand_v=float("inf")), "expand_v must make .* got inf"),
        (
            lambda: KDAStateSpec(2, 2, 8, 8.0, conv_dtype=torch.float32),
            "head_v_dim must be an integer, got 8.0",
        ),
        (
            lambda: before_forward(
                torch.ones(1, 2).int(),
                **COUNTS,
                running_block=torch.zeros(1).int(),
                block_tokens=4.0,
            ),
            "block_tokens must be an integer, got 4.0",
        ),
    ],
)
def test_other_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_layer() -> None:
    layer = KimiDeltaAttention(64, 16, 2).requires_grad_(False)
    state, batch = layer.state_spec().allocate(3), KDABatch.decode([1])
    x = torch.randn(1, 1, 64)
    for change, message in (
        ({"hidden_states": x.tolist()}, "hidden_states must be a tensor, got list"),
        ({"hidden_states": x.int()}, "hidden_states must have dtype"),
        ({"hidden_states": x.to("meta")}, "hidden_states must be on cpu like A_log, got meta"),
        ({"state": state[1]}, "state must be (conv, recurrent), got Tensor"),
        ({"state": (state[0], None)}, "recurrent must be a tensor, got NoneType"),
        ({"batch": 1}, "batch must be a KDABatch, got int"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(**{"hidden_states": x, "state": state, "batch": batch, **change})
    assert not any(part.any() for part in state)
