"""Runs the Triton code that Inductor generates for a GPU, on CPU tensors, in the interpreter.

`tests.support.fake_cuda` makes the source; here its kernels are executed instead of compiled. The
numbers are right up to fp32 rounding; races, launch limits and speed are not covered. Buffers are
filled with NaN and allocated between guards, to detect elements that are not written and writes out
of bounds. Needs TRITON_INTERPRET=1.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GUARD = 1024  # elements
BLOCKS = {"XBLOCK": 32, "YBLOCK": 16, "R0_BLOCK": 64}
REPLACED = {
    "empty_strided_cuda = ": "empty_strided_unused = ",
    "empty_strided_cuda(": "memory.empty(",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": (
        "get_raw_stream = lambda device: None"
    ),
    "async_compile = AsyncCompile()": "async_compile = Interpreted()",
}


class Libdevice:
    """The library functions that generated kernels call, with the interpreter's functions."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        return getattr(tl, name)

    @staticmethod
    def log1p(x: Any) -> Any:
        import triton.language as tl

        u = x + 1.0  # the rounding of u cancels in log(u) / (u - 1)
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


class Kernel:
    """One generated kernel; `run` is called by the generated module as on a GPU."""

    def __init__(self, name: str, source: str) -> None:
        from torch._inductor.runtime import triton_helpers, triton_heuristics

        meta: dict[str, Any] = {}

        def heuristic(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            meta.update(kwargs)
            return lambda kernel: kernel

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            kinds = ("pointwise", "reduction", "persistent_reduction")
            with (
                mock.patch.multiple(triton_heuristics, **dict.fromkeys(kinds, heuristic)),
                mock.patch.object(triton_helpers, "set_driver_to_gpu"),
            ):
                spec.loader.exec_module(module)
            module.libdevice = module.tl_math = Libdevice()
            self.function = getattr(module, name)
        signature = meta["triton_meta"]["signature"]
        self.arguments = [n for n, kind in signature.items() if kind != "constexpr"]
        self.blocks = {n: BLOCKS[n] for n, kind in signature.items() if kind == "constexpr"}

    def run(self, *args: Any, stream: Any = None) -> None:
        values = dict(zip(self.arguments, args, strict=True))
        grid = [
            -(-values.get(f"{axis}numel", 1) // self.blocks.get(f"{axis.upper()}BLOCK", 1))
            for axis in "xy"
        ]
        self.function[tuple(grid)](**values, **self.blocks)


class Interpreted:
    """Replaces Inductor's `AsyncCompile`."""

    def triton(self, name: str, source: str, device_str: str | None = None) -> Kernel:
        return Kernel(name, source)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


class Memory:
    """Buffers of a generated module: poisoned, each between two guards."""

    def __init__(self) -> None:
        self.guards: list[Tensor] = []

    def empty(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        poison = torch.nan if dtype.is_floating_point else 1  # 1 is also a bool
        storage = torch.full((span + 2 * GUARD,), poison, dtype=dtype)
        self.guards += [storage[:GUARD], storage[GUARD + span :]]
        return storage.as_strided(tuple(size), tuple(stride), GUARD)

    def check(self) -> None:
        for guard in self.guards:
            whole = guard.isnan() if guard.dtype.is_floating_point else guard == 1
            assert whole.all(), "a kernel wrote beside a buffer"


def load(source: str) -> Callable[[list[Any]], Any]:
    """The `call` function of a generated module; it takes the list of the graph's inputs."""
    for text, other in REPLACED.items():
        source = source.replace(text, other)
    memory = Memory()
    scope = {
        "__name__": "generated",
        "__file__": "generated",
        "Interpreted": Interpreted,
        "memory": memory,
    }
    exec(compile(source, "<generated>", "exec"), scope)

    def call(args: list[Any]) -> Any:
        results = scope["call"](args)
        memory.check()
        return results

    return call
