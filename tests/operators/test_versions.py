"""PyTorch knows what an operator writes: a tensor that was saved for a backward and then stepped is
an error, whatever wrote it.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kda_ops
from kda_ops._cases import Case
from kda_ops._registry import OPERATORS, define_op
from tests.operators.test_gradients import first_cases
from tests.support.operators import public_function

in_place = pytest.mark.parametrize(("name", "case"), first_cases(mutating=True))


class CudaImplementations(TorchDispatchMode):
    """Runs what CUDA tensors run; in the interpreter, kernels write through pointers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            return OPERATORS[func].cuda(*args)
        return func(*args, **(kwargs or {}))


def assert_versions_grow(name: str, case: Case, device: str) -> None:
    """Of written arguments and the tensors they are views of, no others."""
    inputs = case.make(torch.device(device))
    written = [x for n in case.mutated for x in tree_leaves(inputs[n])]
    whole = [x if x._base is None else x._base for x in written]
    read = [
        x
        for n, value in inputs.items()
        for x in tree_leaves(value)
        if n not in case.mutated and isinstance(x, Tensor)
    ]
    before = [[x._version for x in group] for group in (written, whole, read)]
    with torch.no_grad():
        public_function(name)(**inputs)
    after = [[x._version for x in group] for group in (written, whole, read)]
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert new > old
    assert before[2] == after[2]
    assert any(x._base is not None for x in written)


@in_place
def test_version_counters_of_references(name: str, case: Case) -> None:
    assert_versions_grow(name, case, "cpu")


@pytest.mark.interpreter
@in_place
def test_version_counters_of_kernels(name: str, case: Case) -> None:
    with CudaImplementations():
        assert_versions_grow(name, case, "cpu")


@pytest.mark.gpu
@in_place
def test_version_counters_on_a_gpu(name: str, case: Case) -> None:
    assert_versions_grow(name, case, "cuda")


def poke(x: Tensor, state: Tensor, others: Sequence[Tensor] = (), last: Any = None) -> Tensor:
    """Writes where PyTorch does not see it, as a kernel does."""
    for written in (state, *others, last):
        if written is not None:
            ctypes.memset(written.data_ptr(), 0, written.element_size())
    return torch.empty_like(x)


@pytest.fixture(scope="module")
def pokes() -> Iterator[list[Any]]:
    """An operator that writes a tensor, one that writes a list and an optional tensor too."""
    ops = [
        define_op(
            f"test_{name}(Tensor x, Tensor(a!) state{others}) -> Tensor",
            reference=poke,
            fake=lambda x, *_: torch.empty_like(x),
            cuda="tests.operators.test_versions:poke",
        )
        for name, others in (("poke", ""), ("pokes", ", Tensor(b!)[] others, Tensor(c!)? last"))
    ]
    yield ops
    for op in ops:
        del OPERATORS[op]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_version_counters_of_any_launcher(pokes: list[Any], mode: Any) -> None:
    x, state, *others = (torch.ones(2, 3) for _ in range(4))
    for last in (None, torch.ones(2)):
        written = [state, *others, *([] if last is None else [last])]
        before = [y._version for y in written]
        with mode():
            OPERATORS[pokes[1]].cuda(x, state[1], others, last)
        assert [y._version for y in written] == [n + 1 for n in before]
        assert x._version == 0
        assert state[1, 0] == 0


def test_written_lists_have_no_gradient(pokes: list[Any]) -> None:
    x, state, other, last = (torch.ones(2) for _ in range(4))
    for wrong, name in ((other, "others"), (last, "last"), (state, "state")):
        wrong.requires_grad_()
        with pytest.raises(RuntimeError, match=f"argument {name} requires grad"):
            pokes[1](x, state, [x, other], last)
        wrong.requires_grad_(False)


def test_inference_tensors_have_no_version(pokes: list[Any]) -> None:
    with torch.inference_mode():
        state = torch.ones(2)
    OPERATORS[pokes[0]].cuda(torch.ones(1), state)
    assert state[0] == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_version_counters_in_compiled_code(pokes: list[Any], backend: str) -> None:
    """AOTAutograd counts for a whole graph, which launches kernels without their operator."""

    def step(x: Tensor, cache: Tensor) -> Tensor:
        return pokes[0](x, cache[1])

    cache = torch.ones(2, 3)
    for n in range(2):
        with torch.no_grad():
            torch.compile(step, backend=backend, fullgraph=True)(torch.ones(2), cache)
        assert cache._version > n
    assert cache[1, 0] == 0


def saved_then_stepped(device: str) -> None:
    state = torch.ones(2, 1, 4, 4, device=device)
    heads = [torch.ones(1, 1, 1, 4, device=device) for _ in range(4)]
    beta, slots = torch.ones(1, 1, 1, device=device), torch.tensor([1], device=device)
    weight = torch.ones((), device=device, requires_grad=True)
    loss = (weight * state[1]).sum()
    kda_ops.recurrent_kda(*heads, beta, state, slots)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_that_is_stepped_after_it_was_saved() -> None:
    saved_then_stepped("cpu")


@pytest.mark.gpu
def test_a_state_that_is_stepped_on_a_gpu_after_it_was_saved() -> None:
    saved_then_stepped("cuda")
