"""Calls of autograd as a row measures them, and baselines that cannot run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf.harness.rows import Call


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
