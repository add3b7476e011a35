"""Every hand-written kernel compiles to machine code for the GPUs it is meant for, from the
launches that its cases make, and fits their shared memory.
"""

import importlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from tests.operators import NAMES, RunKernels, cases, public_function


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; `shared` is the most shared memory a program may have, in bytes."""

    backend: str
    arch: Any
    warp_size: int
    binary: str
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "cubin", 163 << 10),
    "sm_90a": Target("cuda", 90, 32, "cubin", 227 << 10),
    "sm_100a": Target("cuda", 100, 32, "cubin", 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, "hsaco", 64 << 10),
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
LAUNCHES_PER_KERNEL = 2


@dataclass(frozen=True)
class Launch:
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]


class Recorder:
    """Takes the place of `traceable`: notes each launch instead of making it."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, kernel: Any) -> Any:
        recorder = self

        class Grid:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: recorder.note(kernel, args, kwargs)

        return Grid()

    def note(self, kernel: Any, args: Any, kwargs: Any) -> None:
        from triton.runtime.jit import mangle_type

        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            value = values.get(parameter.name, parameter.default)
            # as a launch specialises: integers of 1 are constants, multiples of 16 known as such
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = mangle_type(value)
                if isinstance(value, torch.Tensor) or value % 16 == 0:
                    aligned.append(parameter.name)
        launch = Launch(kernel, signature, constants, tuple(aligned), options)
        self.launches[f"{kernel.fn.__name__} {signature} {constants} {options}"] = launch


@cache
def launches_of(name: str) -> list[Launch]:
    """A few distinct launches of each of an operator's kernels, those at the benchmark's sizes
    first.
    """
    recorder = Recorder()
    with ExitStack() as patches:
        for module in (f"kda_ops.{name}.kernel", "kda_ops.device.chunk.kernel"):
            importlib.import_module(module)
            patches.enter_context(mock.patch.multiple(sys.modules[module], traceable=recorder))
        for case in [*cases(name, perf=True)[:1], *cases(name, kernels=True)]:
            with torch.no_grad(), RunKernels():
                public_function(name)(**case.make(torch.device("cpu")))
    chosen: dict[str, list[Launch]] = {}
    for launch in recorder.launches.values():
        chosen.setdefault(launch.kernel.fn.__name__, []).append(launch)
    return [launch for launches in chosen.values() for launch in launches[:LAUNCHES_PER_KERNEL]]


def compile_launch(launch: Launch, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=constants, attrs=attrs
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=dict(launch.options))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile(name: str, target: str) -> None:
    launches = launches_of(name)
    assert launches, f"{name} launches no kernel"
    for launch in launches:
        binary = compile_launch(launch, TARGETS[target])
        assert binary.asm[TARGETS[target].binary]
        assert binary.metadata.shared <= TARGETS[target].shared, launch.kernel.fn.__name__
