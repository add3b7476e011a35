"""Functional operators differentiate through their reference; in-place operators raise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from kda_ops._cases import Case
from tests.support.operators import all_cases, public_function
from tests.support.oracle import copy_inputs, tensors


def first_cases(*, mutating: bool) -> list[Any]:
    """One case of every operator that has such cases, each with results to differentiate."""
    chosen: dict[str, Case] = {}
    for name, case in all_cases():
        if bool(case.mutated) == mutating:
            chosen.setdefault(name, case)
    return [pytest.param(name, case, id=f"{name}-{case.name}") for name, case in chosen.items()]


def differentiable_inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = copy_inputs(case.make(torch.device("cpu")), dtype)
    for x in inputs.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    return inputs


def gradients(function: Any, inputs: dict[str, Any], seed: int = 0) -> list[Tensor]:
    """Gradients of a random projection of the results."""
    generator = torch.Generator().manual_seed(seed)
    results = [t for t in tensors(function(**inputs)) if t.requires_grad]
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in results]
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    total = sum((t * w).sum() for t, w in zip(results, weights, strict=True))
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


@pytest.mark.parametrize(("name", "case"), first_cases(mutating=False))
def test_against_finite_differences(name: str, case: Case) -> None:
    inputs = differentiable_inputs(case, torch.float64)
    names = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]

    def call(*values: Tensor) -> Any:
        results = public_function(name)(**(inputs | dict(zip(names, values, strict=True))))
        return tuple(t for t in tensors(results) if t.requires_grad)

    assert torch.autograd.gradcheck(call, [inputs[n] for n in names], fast_mode=True)


@pytest.mark.parametrize(("name", "case"), first_cases(mutating=False))
def test_results_can_be_written(name: str, case: Case) -> None:
    """In place, as `o *= gate` does."""

    def doubled(**inputs: Any) -> list[Tensor]:
        return [
            t.mul_(2) if t.requires_grad else t for t in tensors(public_function(name)(**inputs))
        ]

    inputs = differentiable_inputs(case, torch.float64)
    once, twice = gradients(public_function(name), inputs), gradients(doubled, inputs)
    for x, y in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * x, y)


@pytest.mark.parametrize(("name", "case"), first_cases(mutating=False))
def test_compiled_gradients_equal_eager_ones(name: str, case: Case) -> None:
    inputs = differentiable_inputs(case, torch.float64)
    eager = gradients(public_function(name), inputs)
    compiled = gradients(torch.compile(public_function(name), fullgraph=True), inputs)
    assert len(eager) == len(compiled) > 0
    for e, c in zip(eager, compiled, strict=True):
        assert e.abs().max() > 0
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize(("name", "case"), first_cases(mutating=True))
def test_in_place_operators_reject_gradients(name: str, case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.make(torch.device("cpu"))
    before = copy_inputs({n: inputs[n] for n in case.mutated})
    argument = next(
        n
        for n, x in inputs.items()
        if any(t.is_floating_point() for t in tree_leaves(x) if isinstance(t, Tensor))
    )
    inputs[argument] = tree_map_only(
        Tensor, lambda x: x.detach().requires_grad_(), inputs[argument]
    )
    # x may be three tensors, q, k and v
    named = "q" if isinstance(inputs[argument], tuple) else argument
    with pytest.raises(RuntimeError, match=f"argument {named} requires grad"):
        public_function(name)(**inputs)
    for n, old in before.items():
        for x, was in zip(tree_leaves(inputs[n]), tree_leaves(old), strict=True):
            assert torch.equal(x.nan_to_num(), was.nan_to_num()), f"{n} was written"
