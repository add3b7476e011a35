"""Backward operators: one tensor per gradient, only what is needed, first derivatives only."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import kda_ops
from kda_ops._cases import Case
from kda_ops._registry import OPERATORS, define_op
from kda_ops.lowering.inline import lower_to_kernel
from tests.operators.test_gradients import differentiable_inputs, first_cases
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import public_function
from tests.support.oracle import tensors

functional = pytest.mark.parametrize(("name", "case"), first_cases(mutating=False))
NO_SECOND = "no second derivatives"


def loss_and_wanted(name: str, case: Case) -> tuple[Tensor, list[Tensor]]:
    inputs = differentiable_inputs(case, torch.float64)
    results = [x for x in tensors(public_function(name)(**inputs)) if x.requires_grad]
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    return sum(x.square().sum() for x in results), wanted


@functional
def test_second_derivatives_are_rejected(name: str, case: Case) -> None:
    """Raised when they are computed, not when a graph of gradients is built."""
    loss, wanted = loss_and_wanted(name, case)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    for x, y in zip(gradients, plain, strict=True):
        assert torch.equal(x, y)
        with pytest.raises(RuntimeError, match=NO_SECOND):
            torch.autograd.grad(x.square().sum() + wanted[0].sum(), wanted, retain_graph=True)


def test_gradient_penalty_of_another_part() -> None:
    """Code that needs no second derivative of an operator is unaffected."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def penalty(normalize: Any) -> Tensor:
        loss = (normalize(x) * weight).pow(3).sum() + weight.pow(4).sum()
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)  # holds the operator's result
        return torch.stack([*torch.autograd.grad(g.square().sum(), x)]).sum()

    expected = penalty(lambda x: x / x.square().sum(-1, keepdim=True).add(1e-6).sqrt())
    torch.testing.assert_close(penalty(kda_ops.l2norm), expected)


def gate(x: Tensor) -> Tensor:
    return kda_ops.gate(x, torch.zeros(2, dtype=x.dtype))


def twice(x: Tensor, function: Any = gate) -> Tensor:
    (g,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum() + 0 * x.sum(), x)[0]


# Dynamo checks whether what it puts into a graph has a `.grad`
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_second_derivatives_are_rejected(backend: str) -> None:
    """Of a compiled forward, and within a compiled function; AOTAutograd supports none at all."""
    x = torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(gate, backend=backend)
    for call in (lambda: twice(x, compiled), lambda: torch.compile(twice, backend=backend)(x)):
        with pytest.raises(RuntimeError, match=f"{NO_SECOND}|does not currently support double"):
            call()


@pytest.mark.parametrize(
    ("name", "case"), [*first_cases(mutating=False), *first_cases(mutating=True)]
)
def test_forward_mode_is_rejected(name: str, case: Case) -> None:
    inputs = case.make(torch.device("cpu"))
    floating = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    before = {n: inputs[n].clone() for n in case.mutated if n in floating}
    for n in floating:
        x = inputs[n]

        def call(other: Tensor, n: str = n) -> list[Tensor]:
            return tensors(public_function(name)(**(inputs | {n: other})))

        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
        for mode in (torch.no_grad, torch.enable_grad):
            with forward_ad.dual_level(), mode():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(NotImplementedError, match=f"argument {n} has a tangent"):
                    call(dual)
    for n, old in before.items():
        assert torch.equal(inputs[n].nan_to_num(), old.nan_to_num())


def test_compiled_forward_mode_is_rejected() -> None:
    def push(x: Tensor) -> Tensor:
        return torch.func.jvp(gate, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.compile(push, backend="aot_eager")(x)


def test_transforms_are_rejected() -> None:
    x = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    grad = torch.func.grad(lambda x: gate(x).sum())
    compiled = torch.compile(grad, backend="aot_eager")
    for transformed in (grad, torch.vmap(grad), torch.func.jacrev(gate), compiled):
        with pytest.raises(RuntimeError, match=r"gate has no gradient under torch\.func"):
            transformed(x)


class Backwards(TorchDispatchMode):
    """Records how many of a backward operator's results are nonempty."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("kda_ops::") and func.name().endswith("_backward"):
            self.gradients.append(sum(x.numel() > 0 for x in tensors(result)))
        return result


@functional
def test_only_needed_gradients_are_computed(name: str, case: Case) -> None:
    """Frozen arguments have none; the others are unchanged."""
    loss, wanted = loss_and_wanted(name, case)
    expected = torch.autograd.grad(loss, wanted)
    for i in range(len(wanted)):
        inputs = differentiable_inputs(case, torch.float64)
        required = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        for x in required:
            x.requires_grad_(x is required[i])
        results = [x for x in tensors(public_function(name)(**inputs)) if x.requires_grad]
        with Backwards() as found:
            sum(x.square().sum() for x in results).backward()
        assert found.gradients == [1]
        torch.testing.assert_close(required[i].grad, expected[i])


def test_gradients_that_are_not_needed_are_empty() -> None:
    x, A_log, bias = torch.randn(3, 2, 4), torch.zeros(2), torch.zeros(2, 4)
    backward = torch.ops.kda_ops.gate_backward
    for needs in ([True, False, False, False], [False, True, True, False], [False] * 4):
        found = backward(x, A_log, bias, None, torch.ones_like(x), needs)
        shapes = [
            y.shape if need else (0,) for y, need in zip((x, A_log, bias), needs, strict=False)
        ]
        assert [y.shape for y in found] == shapes
        assert len({y.untyped_storage()._cdata for y in found}) == 3
    zero = backward(x.transpose(0, 2), A_log, None, -5.0, None, [True, False, False, False])[0]
    assert zero.is_contiguous()
    assert not zero.any()


def test_gradients_do_not_alias() -> None:
    """The gradient of a sum is one tensor for both terms."""
    x, bias = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
    output_gradient = torch.ones(2, 4)
    found = torch.ops.kda_ops.gate_backward(
        x, torch.zeros(2), bias, None, output_gradient, [True, False, True, False]
    )
    torch.testing.assert_close(found[0], found[2])
    assert len({y.untyped_storage()._cdata for y in (*found, output_gradient)}) == 4


launched: list[Any] = []


def launch_test_scale_backward(
    x: Tensor,
    weight: Tensor | None,
    factor: float,
    output_gradients: list[Any],
    needs_gradient: list[bool],
) -> list[Tensor]:
    """The gradient of `x * weight * factor` and of x's sum, like a CUDA launcher."""
    launched.append((output_gradients, needs_gradient))
    product, total = output_gradients
    dx = torch.zeros_like(x) if total is None else total.expand_as(x).clone()
    found = []
    if needs_gradient[0]:
        found.append(dx if product is None else dx + product * weight * factor)
    if needs_gradient[1]:
        found.append((product * x * factor).sum(0))
    return found


def scale_reference(x: Tensor, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return x * (1.0 if weight is None else weight) * factor, x.sum()


@pytest.fixture(scope="module")
def scale() -> Any:
    op = define_op(
        "test_scale(Tensor x, Tensor? weight, float factor) -> (Tensor, Tensor)",
        reference=scale_reference,
        fake=lambda x, *_: (torch.empty_like(x), x.new_empty(())),
        cuda="tests.operators.test_backward:scale_reference",
        cuda_backward="tests.operators.test_backward:launch_test_scale_backward",
    )
    yield op
    del OPERATORS[op]


def test_a_gradient_launcher(scale: Any) -> None:
    """It gets the results' gradients as a list, and returns those that are needed."""
    backward = OPERATORS[scale].backward
    x, weight, g = torch.randn(3, 4), torch.randn(4), torch.randn(3, 4)
    for gradients in ((g, None), (g, torch.ones(()))):
        for needs in ([True, False, False], [True, True, False], [False, True, False]):
            args = (x, weight, 2.0, *gradients, needs)
            found, expected = backward.launcher(*args), backward.op(*args)
            assert launched.pop() == ([*gradients], needs)
            for y, z in zip(found, expected, strict=True):
                torch.testing.assert_close(y, z)
    with pytest.raises(ValueError, match="weight must have dtype float16"):
        backward.launcher(x, weight.double(), 2.0, g, None, [True, False, False])
    assert launched == []


def test_a_gradient_lowering(scale: Any) -> None:
    """Without one a compiled graph has one opaque call, with one it has the launches."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)

    def calls() -> list[bool]:
        _, sources = cuda_code(lambda x, w: scale(x, w, 2.0)[0], x, weight, backward=True)
        return ["test_scale_backward" in str(summary(source).externs) for source in sources]

    assert calls() == [False, True]
    assert launched == []
    lower_to_kernel(OPERATORS[scale].backward)
    assert calls() == [False, False]
    assert [needs for _, needs in launched] == [[True, False, False]]
    launched.clear()


@pytest.mark.gpu
def test_a_gradient_launcher_on_a_gpu(scale: Any) -> None:
    x, weight = torch.randn(3, 4, device="cuda", requires_grad=True), torch.randn(4, device="cuda")
    product, _ = scale(x, weight, 2.0)
    (gradient,) = torch.autograd.grad(product.sum(), x)
    assert [needs for _, needs in launched] == [[True, False, False]]
    launched.clear()
    torch.testing.assert_close(gradient, (2.0 * weight).expand(3, 4))


TRAINING = """
import torch, kda_ops

x = torch.randn(2, 3, 8, requires_grad=True)
found = []
with torch._inductor.config.patch(cpp_wrapper=True):
    for norm in (torch.compile(kda_ops.l2norm, fullgraph=True), kda_ops.l2norm):
        found.append(torch.autograd.grad(norm(x).exp().sum(), x))
torch.testing.assert_close(*found)
print("trained")
"""


def test_training_with_the_cpp_wrapper(tmp_path: Path) -> None:
    """In its own process: Inductor's code for a list of one gradient ended in SIGSEGV."""
    root = Path(kda_ops.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "trained"
