"""The operators and their cases, found by their folders, and ways to run one."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kda_ops._cases import Case, operator_packages, public_function
from kda_ops._registry import OPERATORS

__all__ = ["NAMES", "RunKernels", "all_cases", "cases", "public_function", "run_kernels"]

PACKAGES = operator_packages()
NAMES = sorted(PACKAGES)


def cases(name: str, *, perf: bool = False, kernels: bool = False) -> list[Case]:
    """An operator's cases; with `kernels` those its kernels support."""
    module = importlib.import_module(f"{PACKAGES[name]}.cases")
    return [c for c in module.CASES if c.perf == perf and not (kernels and c.cpu_only)]


def all_cases(*, kernels: bool = False) -> Iterator[tuple[str, Case]]:
    for name in NAMES:
        for case in cases(name, kernels=kernels):
            yield name, case


class RunKernels(TorchDispatchMode):
    """Runs the Triton launcher of every operator, on any device.

    CPU tensors go through Triton's interpreter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            self.launched.append(func.name())
            return OPERATORS[func].launcher(*args)
        return func(*args, **(kwargs or {}))


def run_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every operator's launcher instead of its CPU implementation."""

    def run(**inputs: Any) -> Any:
        with torch.no_grad(), RunKernels() as mode:
            result = function(**inputs)
        assert mode.launched, "no operator was called"
        return result

    return run
