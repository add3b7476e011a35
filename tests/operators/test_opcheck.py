"""`torch.library.opcheck` on every registered operator, with the arguments that its cases make.

The arguments of an operator are not those of its public function, so each case is run once and the
operator's own calls are recorded. A functional operator is also checked with inputs that require
grad.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kda_ops._registry import OPERATORS
from tests.support.operators import NAMES, cases, public_function
from tests.support.oracle import tensors

MOST_ELEMENTS = 40_000
CALLS_PER_OPERATOR = 3
OVERLOADS = sorted(OPERATORS, key=str)
FUNCTIONAL = [op for op in OVERLOADS if not op._schema.is_mutable]
BACKWARDS = {OPERATORS[op].backward.op for op in FUNCTIONAL}


class Record(TorchDispatchMode):
    """Keeps a copy of the arguments of every operator call, made before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS or func in BACKWARDS:
            self.calls.append((func, copy.deepcopy(args)))
        return func(*args, **(kwargs or {}))


def elements(args: Any) -> int:
    return sum(x.numel() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor))


def recorded_calls() -> dict[Any, list[tuple[str, tuple[Any, ...]]]]:
    """Up to a few small calls per operator, as different as its cases: the smallest of every
    signature (which arguments are given, and in which dtypes).
    """
    found: dict[Any, dict[Any, tuple[int, str, tuple[Any, ...]]]] = {op: {} for op in OPERATORS}
    for name in NAMES:
        for case in cases(name):
            torch.manual_seed(0)
            with torch.no_grad(), Record() as record:
                public_function(name)(**case.make(torch.device("cpu")))
            for op, args in record.calls:
                size = elements(args)
                key = tuple(
                    (x.dtype, x.dim(), x.numel() == 0) if isinstance(x, Tensor) else x is None
                    for x in args
                )
                known = found[op].get(key)
                if known is None or size < known[0]:
                    found[op][key] = (size, f"{name}-{case.name}", args)
    return {
        op: [
            (name, args)
            for size, name, args in sorted(calls.values(), key=lambda call: call[:2])
            if 0 < size <= MOST_ELEMENTS
        ][:CALLS_PER_OPERATOR]
        for op, calls in found.items()
    }


@pytest.fixture(scope="module")
def calls() -> dict[Any, list[tuple[str, tuple[Any, ...]]]]:
    return recorded_calls()


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_operator(op: Any, calls: dict[Any, list[tuple[str, tuple[Any, ...]]]]) -> None:
    """Schema, fake implementation, autograd registration, and AOT dispatch, static and dynamic."""
    assert calls[op], f"no small case calls {op}"
    for _, args in calls[op]:
        torch.library.opcheck(op, copy.deepcopy(args))


# from torch 2.15 opcheck clones its inputs, and AOTAutograd looks whether a clone has a `.grad`
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("op", FUNCTIONAL, ids=str)
def test_operator_with_gradients(
    op: Any, calls: dict[Any, list[tuple[str, tuple[Any, ...]]]]
) -> None:
    for _, args in calls[op]:
        inputs = [
            x.detach().clone().requires_grad_()
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in copy.deepcopy(args)
        ]
        torch.library.opcheck(op, tuple(inputs))


@pytest.mark.parametrize("op", FUNCTIONAL, ids=str)
def test_backward_operator(op: Any, calls: dict[Any, list[tuple[str, tuple[Any, ...]]]]) -> None:
    """With all gradients, and with that of the last argument that has one."""
    _, args = calls[op][0]
    floating = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
    for needed in (floating, floating[-1:]):
        inputs = list(copy.deepcopy(args))
        for i in needed:
            inputs[i].requires_grad_()
        results = [x for x in tensors(op(*inputs)) if x.requires_grad]
        with Record() as record:
            sum(x.sum() for x in results).backward()
        ((backward, found),) = record.calls
        assert backward is OPERATORS[op].backward.op
        torch.library.opcheck(backward, tree_map_only(Tensor, Tensor.detach, found))


def test_every_operator_is_covered(
    calls: dict[Any, list[tuple[str, tuple[Any, ...]]]],
) -> None:
    assert {op for op, found in calls.items() if found} == set(OPERATORS)
    assert OPERATORS
