"""Runs the Triton code that Inductor generates for a GPU, on CPU tensors, in the interpreter.

`tests.support.fake_cuda` makes the source; here its kernels are executed instead of compiled, those
of Inductor and the hand-written ones that it embeds. The numbers are right up to fp32 rounding;
races, launch limits and speed are not covered. Buffers are filled with NaN and allocated between
guards, to detect elements that are not written and writes out of bounds.

Triton decides at import whether it interprets kernels, and traces hand-written ones into a graph
only where it does not. So unless TRITON_INTERPRET=1 is set here, the source runs in a second
process in which it is.
"""

import functools
import inspect
import io
import itertools
import linecache
import multiprocessing
import os
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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

    serial = itertools.count()

    def __init__(self, name: str, source: str) -> None:
        from torch._inductor.runtime import triton_helpers, triton_heuristics

        meta: dict[str, Any] = {}

        def heuristic(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            meta.update(kwargs)
            return lambda kernel: kernel

        path = f"<{name} {next(self.serial)}>"
        # the interpreter reads the source of what it runs; without a time it is not looked for
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        module = types.ModuleType(name)
        module.__file__ = path
        kinds = ("pointwise", "reduction", "persistent_reduction", "user_autotune")
        with (
            mock.patch.multiple(triton_heuristics, **dict.fromkeys(kinds, heuristic)),
            mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        ):
            exec(compile(source, path, "exec"), vars(module))
        module.libdevice = module.tl_math = Libdevice()
        self.function = getattr(module, name)
        self.custom = meta.get("custom_kernel", False)
        signature = meta["triton_meta"]["signature"]
        if self.custom:
            declared = inspect.signature(self.function.fn).parameters
            constexprs = [n for n, x in declared.items() if "constexpr" in str(x.annotation)]
            self.arguments = [n for n in signature if n not in constexprs]
            self.arguments += meta["inductor_meta"]["extra_launcher_args"]
            # what is None is printed as -1
            self.constants = dict(meta["triton_meta"]["constants"])
            if "PACKED" in self.constants:
                self.constants["PACKED"] = False  # inline assembly is not interpreted
        else:
            self.arguments = [n for n, kind in signature.items() if kind != "constexpr"]
            self.constants = {n: BLOCKS[n] for n, kind in signature.items() if kind == "constexpr"}

    def run(self, *args: Any, stream: Any = None) -> None:
        values = dict(zip(self.arguments, args, strict=True))
        if self.custom:
            grid = [values.pop(f"_grid_{axis}") for axis in range(3)]
        else:
            grid = [
                -(-values.get(f"{axis}numel", 1) // self.constants.get(f"{axis.upper()}BLOCK", 1))
                for axis in "xy"
            ]
        self.function[tuple(grid)](**values | self.constants)


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
        self.guards.clear()


def load(source: str) -> Callable[[list[Any]], Any]:
    """The `call` function of a generated module; it takes the list of the graph's inputs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return functools.partial(call_there, source)
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


# ---------------------------------------------------------------------- the second process


def call_there(source: str, args: list[Any]) -> list[Any]:
    """Calls a generated module in the process that interprets; written inputs are written here."""
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in args]
    args.clear()
    values = unpacked(interpreter().submit(answer, source, packed(inputs)).result())
    for x, written in zip(inputs, values, strict=False):
        if isinstance(x, Tensor):
            x.untyped_storage().copy_(written.untyped_storage())
    return values[len(inputs) :]


@functools.cache
def interpreter() -> ProcessPoolExecutor:
    """The process; it ends with this one."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        process.submit(begin).result()
    return process


def begin() -> None:
    import kda_ops  # noqa: F401  generated code may call an operator
    from tests.support.interpreter import patch_interpreter

    torch.set_num_threads(1)
    patch_interpreter()


def answer(source: str, arguments: bytes) -> bytes:
    """The inputs of a generated module after a call of it, then its results."""
    inputs = unpacked(arguments)
    results = loaded(source)(list(inputs))
    return packed([*inputs, *results])


loaded = functools.lru_cache(maxsize=8)(load)


def packed(values: list[Any]) -> bytes:
    """Tensors as tuples, and the whole memory that they view, which is shared by the states."""
    storages: dict[int, Tensor] = {}

    def described(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        key = storage.data_ptr()
        storages[key] = torch.empty(0, dtype=torch.uint8).set_(storage)
        return key, x.dtype, x.shape, x.stride(), x.storage_offset()

    stream = io.BytesIO()
    torch.save(([described(x) for x in values], storages), stream)
    return stream.getvalue()


def unpacked(data: bytes) -> list[Any]:
    values, storages = torch.load(io.BytesIO(data))

    def tensor(key: int, dtype: torch.dtype, *view: Any) -> Tensor:
        size, stride, offset = view
        whole = torch.empty(0, dtype=dtype)
        return whole.set_(storages[key].untyped_storage(), offset, size, stride)

    return [tensor(*x) if isinstance(x, tuple) else x for x in values]
