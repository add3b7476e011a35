"""`kda_ops.config.impl = "reference"`: the definitions, on any device, eager and compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import kda_ops
from kda_ops import KDABatch, KimiDeltaAttention, config
from kda_ops._cases import public_function
from kda_ops.lowering.rewrites import framework as rewrites
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import NAMES, cases

CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """The operators of this package that are called, as `namespace::name`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("kda_ops"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def inputs_of(name: str) -> dict[str, Any]:
    case = next(c for c in cases(name) if not c.perf and not c.cpu_only)
    torch.manual_seed(0)
    return case.make(CPU)


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, Tensor.clone, inputs)


def results(out: Any, inputs: dict[str, Any]) -> list[Tensor]:
    return [x for x in tree_leaves((out, inputs)) if isinstance(x, Tensor)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_eager_calls_the_definition(name: str) -> None:
    function = public_function(name)
    first, second = inputs_of(name), inputs_of(name)
    expected = function(**first)
    with kda_ops.reference(), Calls() as calls:
        found = function(**second)
    assert calls.names == [f"kda_ops_reference::{name}"]
    assert_equal(results(found, second), results(expected, first))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_calls_the_definition(name: str) -> None:
    """On a GPU too: one opaque call, with the numbers of the eager one."""
    function = public_function(name)
    first, second = inputs_of(name), inputs_of(name)
    with kda_ops.reference():
        expected = function(**first)
        found, (source,) = cuda_code(lambda **inputs: function(**inputs), **second)
    ours = [call for call in summary(source).externs if "kda_ops" in call]
    assert [call.split(".")[2:4] for call in ours] == [["kda_ops_reference", name]]
    assert [launch for launch in summary(source).launches if launch.endswith("_kernel")] == []
    assert_equal(results(found, second), results(expected, first))


def test_no_native_kernels() -> None:
    """On a CPU, too, compiled code calls the definition."""
    inputs = inputs_of("chunk_kda")
    compiled = torch.compile(kda_ops.chunk_kda, fullgraph=True)
    _, (auto,) = run_and_get_code(compiled, **inputs)
    with kda_ops.reference():
        _, (source,) = run_and_get_code(compiled, **inputs)
    assert "native_chunk_kda" in auto
    assert "kda_ops_reference.chunk_kda.default" in source
    assert "native_" not in source


def small_model(x: Tensor, A_log: Tensor) -> Tensor:
    """Without the mode one kernel: `fuse_gate_cumsum`."""
    return kda_ops.chunk_cumsum(kda_ops.gate(x, A_log), chunk_size=64)


def small_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 128, 2, 16), torch.randn(2)


def test_a_change_recompiles_once() -> None:
    inputs, graphs = small_inputs(), []

    def backend(gm: Any, args: Any) -> Callable[..., Any]:
        graphs.append(namespaces(gm))
        return gm.forward

    compiled = torch.compile(small_model, backend=backend, fullgraph=True)
    for mode in ("auto", "reference", "auto", "reference"):
        config.impl = mode
        try:
            compiled(*inputs)
        finally:
            config.impl = "auto"
    assert graphs == [{"kda_ops"}, {"kda_ops_reference"}]


def namespaces(gm: torch.fx.GraphModule) -> set[str]:
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return {x.namespace for x in targets if getattr(x, "namespace", "").startswith("kda_ops")}


def test_part_of_a_traced_function() -> None:
    """Rewrites leave a graph alone that calls a definition anywhere."""

    def model(x: Tensor, A_log: Tensor) -> Tensor:
        with kda_ops.reference():
            g = kda_ops.gate(x, A_log)
        return kda_ops.chunk_cumsum(g, chunk_size=64)

    inputs = small_inputs()
    result, (source,) = cuda_code(model, *inputs)
    assert config.impl == "auto"
    assert [call for call in summary(source).externs if "kda_ops" in call] == [
        "torch.ops.kda_ops_reference.gate.default"
    ]
    assert torch.equal(result, small_model(*inputs))


def test_plain_pytorch_next_to_a_definition_is_not_rewritten() -> None:
    """No rewrite turns plain PyTorch into an operator."""

    def model(x: Tensor, A_log: Tensor) -> Tensor:
        g = -A_log.exp()[:, None] * torch.nn.functional.softplus(x)
        return kda_ops.chunk_cumsum(g, chunk_size=64)

    inputs = small_inputs()
    with rewrites.recording() as outcomes, kda_ops.reference():
        cuda_code(model, *inputs)
    assert outcomes == []
    with rewrites.recording() as outcomes:
        cuda_code(model, *inputs)
    assert any(outcome.reason is None for outcome in outcomes)


def test_gradients_match_the_forward_implementation() -> None:
    inputs = [x.requires_grad_() for x in small_inputs()]
    with kda_ops.reference():
        out = small_model(*inputs)
    with Calls() as calls:
        found = torch.autograd.grad(out.sum(), inputs)
    assert calls.names == [
        "kda_ops_reference::chunk_cumsum_backward",
        "kda_ops_reference::gate_backward",
    ]
    expected = torch.autograd.grad(small_model(*inputs).sum(), inputs)
    assert_equal(list(found), list(expected))


def test_compiled_gradients() -> None:
    inputs = [x.requires_grad_() for x in small_inputs()]
    with kda_ops.reference():
        _, sources = cuda_code(small_model, *inputs, backward=True)
    assert len(sources) == 2
    called = [[c.split(".")[2:4] for c in summary(s).externs if "kda_ops" in c] for s in sources]
    assert called == [
        [["kda_ops_reference", "gate"], ["kda_ops_reference", "chunk_cumsum"]],
        [["kda_ops_reference", "chunk_cumsum_backward"], ["kda_ops_reference", "gate_backward"]],
    ]


def test_a_step_in_place() -> None:
    """A whole layer, with states that both kinds of operators write; compiled, too."""
    layer = KimiDeltaAttention(32, 16, 2).requires_grad_(False)
    steps = [KDABatch.decode(torch.tensor([2, 1])), torch.randn(1, 2, 32)]
    first, second, third = (layer.state_spec().allocate(3) for _ in range(3))
    expected = layer(steps[1], state=first, batch=steps[0])
    with kda_ops.reference():
        with Calls() as calls:
            found = layer(steps[1], state=second, batch=steps[0])
        compiled, (source,) = cuda_code(layer, steps[1], state=third, batch=steps[0])
    assert {name.split("::")[0] for name in calls.names} == {"kda_ops_reference"}
    assert "torch.ops.kda_ops." not in source
    assert_equal([found, *second], [expected, *first])
    for x, y in zip([compiled, *third], [expected, *first], strict=True):
        torch.testing.assert_close(x, y)


def test_fp64_on_a_gpu() -> None:
    """Allowed only in the definition."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, dtype=torch.float64, device="cuda")
        with pytest.raises(ValueError, match="x must have dtype float16, bfloat16 or float32"):
            kda_ops.l2norm(x)
        with kda_ops.reference():
            y = kda_ops.l2norm(x)
    assert (y.dtype, y.device) == (x.dtype, x.device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_version_counters_on_a_gpu(name: str) -> None:
    """The definition takes fp64 there and agrees with the CPU."""
    function, inputs = public_function(name), inputs_of(name)
    doubled = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    on_gpu = tree_map_only(Tensor, lambda x: x.cuda(), doubled)
    expected = function(**doubled)
    with kda_ops.reference():
        found = function(**on_gpu)
    for x, y in zip(results(found, on_gpu), results(expected, doubled), strict=True):
        torch.testing.assert_close(x.cpu(), y, equal_nan=True)


def test_values_are_checked() -> None:
    config.impl = "fast"
    try:
        with pytest.raises(ValueError, match="impl must be one of auto, reference, got 'fast'"):
            kda_ops.l2norm(torch.ones(2, 3))
    finally:
        config.impl = "auto"


def test_the_mode_ends_with_its_block() -> None:
    with pytest.raises(RuntimeError), kda_ops.reference():
        raise RuntimeError
    assert config.impl == "auto"
