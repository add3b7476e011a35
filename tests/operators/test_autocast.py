"""Operators disable autocast: they compute in the dtypes of their inputs, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import kda_ops
from kda_ops._cases import Case
from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.operators.test_gradients import first_cases
from tests.support.as_traced import as_traced
from tests.support.operators import public_function
from tests.support.oracle import copy_inputs, tensors

DTYPES = (torch.bfloat16, torch.float16)
PROJECTIONS = ("in_proj", "f_proj", "g_proj", "o_proj")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case: Case, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """A case's inputs, floating-point tensors in `dtype` if one is given."""
    torch.manual_seed(0)
    inputs = copy_inputs(case.make(torch.device("cpu")), dtype)
    moved: dict[str, Any] = tree_map_only(Tensor, lambda x: x.to(device), inputs)
    return moved


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, except the bits of NaN."""
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@devices
@pytest.mark.parametrize("inputs_in", [None, torch.float32], ids=["as-they-are", "fp32"])
@pytest.mark.parametrize(
    ("name", "case"), [*first_cases(mutating=False), *first_cases(mutating=True)]
)
def test_results_and_states(
    name: str, case: Case, inputs_in: torch.dtype | None, device: str
) -> None:
    def run() -> list[Tensor]:
        inputs = made(case, device, inputs_in)
        with torch.no_grad():
            results = tensors(public_function(name)(**inputs))
        return [*results, *tensors([inputs[name] for name in case.mutated])]

    expected = run()
    for dtype in DTYPES:
        with torch.autocast(device, dtype):
            assert_same(run(), expected)


@devices
@pytest.mark.parametrize(("name", "case"), first_cases(mutating=False))
def test_gradients(name: str, case: Case, device: str) -> None:
    def run() -> list[Tensor]:
        inputs = made(case, device, torch.float32)
        wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        for x in wanted:
            x.requires_grad_()
        results = [x for x in tensors(public_function(name)(**inputs)) if x.requires_grad]
        weights = [torch.randn_like(x) for x in results]
        return [
            x
            for x in torch.autograd.grad(results, wanted, weights, allow_unused=True)
            if x is not None
        ]

    expected = run()
    for dtype in DTYPES:
        with torch.autocast(device, dtype):
            assert_same(run(), expected)


def layer_and_cast(
    dtype: torch.dtype, device: str
) -> tuple[KimiDeltaAttention, KimiDeltaAttention]:
    """A layer in fp32, and the same one with its projections in `dtype`."""
    layer = KimiDeltaAttention(32, 16, 2, device=device)
    cast = copy.deepcopy(layer)
    for name in PROJECTIONS:
        cast.get_submodule(name).to(dtype)
    return layer, cast


@devices
@dtypes
@torch.no_grad()
def test_a_layer_equals_one_with_projections_in_the_dtype(dtype: torch.dtype, device: str) -> None:
    layer, cast = layer_and_cast(dtype, device)
    x = torch.randn(1, 70, 32, device=device)
    with torch.autocast(device, dtype):
        out, state = layer(x, output_state=True)
    expected, expected_state = cast(x.to(dtype), output_state=True)
    assert_same([out, state[1]], [expected, expected_state[1]])
    assert_same([state[0].to(dtype)], [expected_state[0]])
    spec = layer.state_spec()
    assert [x.dtype for x in state] == [spec.conv_dtype, spec.recurrent_dtype]


@devices
@dtypes
def test_gradients_of_a_layer(dtype: torch.dtype, device: str) -> None:
    layer, cast = layer_and_cast(dtype, device)
    x = torch.randn(1, 70, 32, device=device)
    with torch.autocast(device, dtype):
        layer(x).square().sum().backward()
    cast(x.to(dtype)).float().square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), cast.parameters(), strict=True):
        assert p.grad.dtype == torch.float32, name
        assert_same([p.grad], [q.grad.float()])


@devices
@dtypes
@pytest.mark.parametrize("layout", ["SD", "DS"])
@torch.no_grad()
def test_steps_of_a_server(dtype: torch.dtype, device: str, layout: str) -> None:
    """Projections in 16 bits meet fp32 weights of the convolution and fp32 states."""
    layer, cast = layer_and_cast(dtype, device)
    layer.conv_layout = cast.conv_layout = layout
    found, expected = (layer.state_spec(num_spec=1).allocate(8, device=device) for _ in range(2))
    steps = [
        KDABatch.prefill([5, 70], [1, 2], device=device),
        KDABatch.decode([1, 2], device=device),
        KDABatch.decode([[1, 3], [2, 4]], lengths=[2, 1], num_accepted=[1, 1], device=device),
        KDABatch.mixed([1, 1], [3], [3, 2, 5], device=device),
    ]
    for batch in steps:
        x = torch.randn(1, batch.num_tokens, 32, device=device)
        with torch.autocast(device, dtype):
            out = layer(x, state=found, batch=batch)
        assert_same([out, *found], [cast(x.to(dtype), state=expected, batch=batch), *expected])


def test_compiled_training_step() -> None:
    """To the last bit, of the operators that are traced."""
    layer, _ = layer_and_cast(torch.bfloat16, "cpu")
    x = torch.randn(1, 70, 32)
    results = []
    for forward in (as_traced(layer), torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), layer.parameters())])
    for compiled, eager in zip(*results[::-1], strict=True):
        torch.testing.assert_close(compiled, eager)


def test_references_are_lowered_without_autocast() -> None:
    """The inlined IR equals that of the same call without autocast."""

    def f(x: Tensor, A_log: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        g = kda_ops.gate(x, A_log)
        return g, kda_ops.chunk_cumsum(g), kda_ops.rms_norm_gated(kda_ops.l2norm(x), x, weight)

    inputs = (torch.randn(1, 70, 2, 16), torch.zeros(2), torch.randn(16))
    expected = torch.compile(f, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(f, fullgraph=True)(*inputs)
    assert_same([*found], [*expected])


@torch.no_grad()
def test_compiled_decode() -> None:
    layer, cast = layer_and_cast(torch.bfloat16, "cpu")
    batch = KDABatch.decode([1, 2])
    x = torch.randn(1, 2, 32)
    found = layer.state_spec().allocate(4)
    expected = [state.normal_().clone() for state in found]
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(layer, fullgraph=True)(x, state=found, batch=batch)
    torch._dynamo.reset()
    how = {"state": tuple(expected), "batch": batch}
    assert_same(
        [out, *found], [torch.compile(cast, fullgraph=True)(x.bfloat16(), **how), *expected]
    )
