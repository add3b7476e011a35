"""Gradients of pointwise work, rows and sums along chunks as IR: right, fused, without atomics."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops._cases import Case
from kda_ops._gradients import Signature
from kda_ops._registry import OPERATORS
from tests.support.fake_cuda import cuda_code, summary
from tests.support.generated import load
from tests.support.operators import cases, public_function
from tests.support.oracle import assert_close, copy_inputs, poisoned, tensors

FORMULAS = ("gate", "l2norm", "rms_norm_gated")
SCANS = ("chunk_cumsum", "gate_cumsum")


def overload(name: str) -> Any:
    return getattr(torch.ops.kda_ops, name).default


def backward_call(name: str, inputs: dict[str, Any]) -> tuple[list[Any], list[Any], list[bool]]:
    """The arguments of an operator in order, a random gradient of its result, and what is
    differentiable.
    """
    op = overload(name)
    found: list[tuple[Any, ...]] = []
    with torch.no_grad(), Recorded(op, found):
        result = public_function(name)(**inputs)
    (args,) = found
    needs = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
    return list(args), [torch.randn_like(result)], needs


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of the calls of one operator."""

    def __init__(self, op: Any, found: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.op, self.found = op, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def needed(name: str, results: Any, needs: list[bool]) -> list[Tensor]:
    wanted = Signature(overload(name)).wanted
    return [x for i, x in zip(wanted, tensors(results), strict=True) if needs[i]]


def assert_right(name: str, found: Any, args: list[Any], needs: list[bool]) -> None:
    """Gradients against autograd's in the same dtypes and in fp64."""
    backward = OPERATORS[overload(name)].backward.op
    by_place = {str(i): x for i, x in enumerate(args)}
    low = backward(*args, needs)
    high = backward(*copy_inputs(by_place, torch.float64).values(), needs)
    triples = [needed(name, x, needs) for x in (found, low, high)]
    for x, y, z in zip(*triples, strict=True):
        assert_close(x, y, z)
        assert x.is_contiguous()


def parameters(names: tuple[str, ...]) -> Any:
    found = [(name, case) for name in names for case in cases(name) if not case.mutated]
    found = [x for x in found if (x[0], x[1].name) != ("short_conv", "empty")]  # is not lowered
    return pytest.mark.parametrize(
        ("name", "case"), [pytest.param(n, c, id=f"{n}-{c.name}") for n, c in found]
    )


@parameters(FORMULAS)
def test_formulas_are_the_derivatives(name: str, case: Case) -> None:
    from kda_ops.lowering.operators.gradients import FORMULAS, as_operator

    args, gradients, needs = backward_call(name, case.make(torch.device("cpu")))
    op = overload(name)
    found = as_operator(op, FORMULAS[op])(*args, *gradients, needs)
    assert_right(name, found, [*args, *gradients], needs)


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("rate", [-200.0, -60.0, 60.0, 200.0])
def test_gates_at_their_edges(bound: float | None, rate: float) -> None:
    """Rates that are clamped have no gradient, and nothing is NaN."""
    from kda_ops.lowering.operators.gradients import FORMULAS, as_operator

    x = torch.tensor([-1e38, -200.0, -1.0, 0.0, 30.0, 1e38]).view(6, 1, 1)
    args = [x, torch.tensor([rate]), torch.zeros(1), bound, torch.ones_like(x)]
    needs = [True, True, True, False]
    op = overload("gate")
    found = as_operator(op, FORMULAS[op])(*args, needs)
    for y, expected in zip(found, torch.ops.kda_ops.gate_backward(*args, needs), strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(y, expected)


def generated(name: str, args: list[Any], needs: list[bool], dynamic: bool) -> Any:
    """What the kernels that are generated for a GPU make, in the interpreter."""
    backward = OPERATORS[overload(name)].backward.op
    floating = [i for i, x in enumerate(args) if isinstance(x, Tensor)]

    def call(*inputs: Tensor) -> Any:
        filled = list(args)
        for i, x in zip(floating, inputs, strict=True):
            filled[i] = x
        return backward(*filled, needs)

    with torch.no_grad(), poisoned():
        found, (source,) = cuda_code(call, *[args[i] for i in floating], dynamic=dynamic, load=load)
    assert summary(source).externs == []
    assert "tl.atomic" not in source
    return found


def random_inputs(name: str, variant: str) -> dict[str, Any]:
    bf16 = torch.bfloat16
    cu_seqlens = torch.tensor([0, 40, 40, 58], dtype=torch.int32)
    x = torch.randn(1, 70, 2, 8).to(bf16)
    if name == "l2norm":
        return {"x": torch.randn(3, 5, 24).to(bf16)}
    if name == "rms_norm_gated":
        o, gate = torch.randn(2, 3, 9, 16).to(bf16)
        return {"o": o, "output_gate": gate, "weight": torch.randn(16)}
    if name == "short_conv":
        x = torch.randn(1 if variant == "varlen" else 2, 70, 24).to(bf16)
        inputs: dict[str, Any] = {"x": x, "weight": torch.randn(24, 4), "bias": torch.randn(24)}
    elif name == "chunk_cumsum":
        inputs = {"g": x, "scale": 0.5, "chunk_size": 32}
        if variant == "whole":
            inputs["g"] = torch.randn(2, 128, 3)
    else:
        inputs = {"raw_gate": x, "A_log": torch.randn(2), "dt_bias": torch.randn(16)}
    if variant == "bounded":
        inputs["lower_bound"] = -5.0
    if variant == "varlen":
        x[:, 58:] = torch.nan
        inputs["cu_seqlens"] = cu_seqlens
    return inputs


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "variant", "dynamic"),
    [
        ("l2norm", "", True),
        ("gate", "", False),
        ("gate", "bounded", True),
        ("chunk_cumsum", "", False),
        ("chunk_cumsum", "", True),
        ("chunk_cumsum", "whole", False),
        ("chunk_cumsum", "varlen", False),
        ("gate_cumsum", "", True),
        ("gate_cumsum", "bounded", False),
        ("gate_cumsum", "varlen", False),
    ],
)
def test_generated_kernels(name: str, variant: str, dynamic: bool) -> None:
    args, gradients, needs = backward_call(name, random_inputs(name, variant))
    found = generated(name, [*args, *gradients], needs, dynamic)
    if variant == "varlen":  # NaN in padding; what the reference makes of it is checked elsewhere
        gradients[0][:, 58:] = 0
    assert_right(name, found, [*args, *gradients], needs)


@pytest.mark.interpreter
def test_sums_that_overflow_have_no_gradient() -> None:
    """Nor do they have one for the tokens before, which a sum of them contains."""
    x = torch.zeros(1, 8, 2, 4)
    x[:, 3] = 1e30
    args = [x, torch.tensor([80.0, 1.0]), None, None, 16, None, None, torch.ones_like(x)]
    needs = [True, True, *[False] * 5]
    found = generated("gate_cumsum", args, needs, False)
    expected = torch.ops.kda_ops.gate_cumsum_backward(*args, needs)
    for y, e in zip(needed("gate_cumsum", found, needs), expected, strict=False):
        torch.testing.assert_close(y, e)
    assert found[0][:, 2, 1].ne(0).all()
    assert found[0][:, 4, 1].ne(found[0][:, 4, 0]).all()


def training(name: str) -> tuple[Any, list[Tensor]]:
    inputs = random_inputs(name, "")
    names = [n for n, x in inputs.items() if isinstance(x, Tensor)]
    options = {n: x for n, x in inputs.items() if n not in names}
    function = public_function(name)

    def call(*values: Tensor) -> Tensor:
        result: Tensor = function(**dict(zip(names, values, strict=True)), **options)
        return result

    return call, [inputs[n].requires_grad_() for n in names]


@pytest.mark.parametrize("name", [*FORMULAS, *SCANS])
def test_compiled_gradients(name: str) -> None:
    """By the one rule on a CPU, and two runs give the same bits."""
    call, values = training(name)
    weight = torch.randn_like(call(*values))

    def gradients(function: Any, inputs: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((function(*inputs) * weight).sum(), inputs)

    compiled = torch.compile(call, fullgraph=True)
    found, again = (gradients(compiled, values, weight) for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in values]
    low, high = gradients(call, values, weight), gradients(call, wide, weight.double())
    for x, y, z, other in zip(found, low, high, again, strict=True):
        assert_close(x, y, z)
        assert torch.equal(x, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gate", 5),
        ("l2norm", 1),
        ("chunk_cumsum", 1),
        ("gate_cumsum", 7),
    ],
)
def test_launches(name: str, most: int, dynamic: bool) -> None:
    """Generated kernels alone: nothing is called, and nothing is added up by atomics."""
    call, values = training(name)
    _, (_, source) = cuda_code(call, *values, dynamic=dynamic, backward=True)
    found = summary(source)
    assert found.externs == []
    assert len(found.launches) <= most, str(found)
    assert all(f"fused_{name}_backward" in launch for launch in found.launches), str(found)
    assert "tl.atomic" not in source


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("name", "parameters"), [("rms_norm_gated", 1), ("short_conv", 2)])
def test_a_kernel_and_a_sum_per_parameter(name: str, parameters: int, dynamic: bool) -> None:
    """The sums are over the parts of the kernel's programs."""
    call, values = training(name)
    _, (_, source) = cuda_code(call, *values, dynamic=dynamic, backward=True)
    found = summary(source)
    assert found.externs == []
    *others, kernel = sorted(found.launches, reverse=True)
    assert kernel == f"{name}_backward_kernel"
    assert len(others) <= 1 + parameters  # the gradient of the test's sum is filled


@pytest.mark.parametrize(("name", "kernels"), [("gate", 1), ("rms_norm_gated", 1)])
def test_only_what_is_needed_is_computed(name: str, kernels: int) -> None:
    call, values = training(name)
    for x in values[1:]:
        x.requires_grad_(False)
    _, (_, source) = cuda_code(call, *values, backward=True)
    assert len(summary(source).launches) == kernels
