"""Calls of autograd as a row measures them, and what they are checked against; baselines that
cannot run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kda_ops._registry import OPERATORS
from perf.harness.rows import Call, Inputs


class UnavailableError(RuntimeError):
    """A baseline is installed, but cannot run here: its rows are left out, with this message."""


def differentiated(
    forward: bool, leaves: list[Tensor], output: Callable[[], Tensor], gradient: Tensor
) -> Call:
    """A call of autograd: backward alone, or with its forward."""
    with torch.enable_grad():
        kept = None if forward else output()

    def call() -> Any:
        with torch.enable_grad():
            o = output() if kept is None else kept
            return o, torch.autograd.grad(o, leaves, gradient, retain_graph=not forward)

    return call


def arguments_of(op: Any, inputs: Inputs) -> list[Any]:
    """An operator's arguments, None where there is none of a name."""
    return [inputs.get(argument.name) for argument in op._schema.arguments]


def reference_gradients(op: Any, inputs: Inputs, names: Sequence[str], gradient: Tensor) -> Call:
    """Autograd through the eager reference of an operator, with its forward."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    arguments = arguments_of(op, inputs | leaves)

    def output() -> Tensor:
        result = OPERATORS[op].reference(*arguments)
        found: Tensor = result if isinstance(result, Tensor) else result[0]
        return found

    return differentiated(True, list(leaves.values()), output, gradient)


def without_output(call: Call) -> Call:
    """The gradients alone."""
    return lambda: call()[1]
