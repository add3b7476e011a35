"""C++ kernels that compiled graphs call on a CPU, in the place of the references.

They are written with PyTorch's own vectors (`at::vec`) for fp32, and compiled on first use by what
compiles Inductor's kernels, into its cache. Eager calls are the references and need no compiler;
without one, compiled graphs call the references too, after a warning.
"""

import ctypes
import functools
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kda_ops._library import NAMESPACE, implement_fake
from kda_ops._registry import OPERATORS, lowering_module


class InvalidValues(Exception):
    """An implementation does not take the values of its tables."""


NATIVE: dict[Any, Any] = {}  # by the operator in whose place it is
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SOURCES = ("vectors.h", "chunk.cpp", "conv.cpp", "decode.cpp")


def define_native(op: Any, target: str, *, looks_itself: bool = False) -> None:
    """Registers `kda_ops::native_<name>`, which is `op` on CPU tensors, for lowerings to call.

    Args:
        op: An operator of `define_op`: schema, fake implementation and checks of values are its
            own, and its reference computes what is in fp64.
        target: `"module:function"` of the implementation, same arguments, imported on first use.
        looks_itself: Whether the implementation looks at the values of tables before it writes
            anything, and raises `InvalidValues` where the operator's own check is to say what is
            wrong: in a decode step that check takes longer than the step.
    """
    name = f"native_{op._schema.name.split('::')[1]}"
    arguments = str(op._schema).split("(", 1)[1]
    name = ".".join(filter(None, (name, op._schema.overload_name)))
    module, _, attribute = target.partition(":")

    found: list[Callable[..., Any]] = []
    operator = OPERATORS[op]

    def check(args: tuple[Any, ...]) -> None:
        if operator.check_values is not None:
            operator.check_values(*args)

    def cpu_impl(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), attribute))
        exact = any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in args)
        if exact or not compiles():
            check(args)
            return operator.reference(*args)
        if not looks_itself:
            check(args)
        try:
            return found[0](*args)
        except InvalidValues:
            check(args)
            raise

    _LIBRARY.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu_impl, "CPU")
    implement_fake(_LIBRARY, name, operator.fake)
    packet, _, overload = name.partition(".")
    NATIVE[op] = getattr(getattr(torch.ops.kda_ops, packet), overload or "default")


def source() -> str:
    """The C++ source of all kernels."""
    here = Path(__file__).parent
    return "\n".join((here / part).read_text() for part in _SOURCES)


@functools.cache
def kernel(name: str, *argtypes: Any, result: Any = None) -> Any:
    """One of the compiled functions, with the types of its arguments and of its result."""
    function = getattr(_library(), name)
    function.argtypes, function.restype = argtypes, result
    return function


@functools.cache
def compiles() -> bool:
    """Whether there is a C++ compiler that takes the kernels; warns once where there is none."""
    try:
        _library()
    except lowering_module("compat").CPP_ERRORS as error:
        warnings.warn(f"kda_ops computes on the CPU without its C++ kernels: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    library: ctypes.CDLL = lowering_module("compat").load_cpp(source())
    return library


def fp32(x: Tensor) -> Tensor:
    """`x` in fp32 with a dense last axis."""
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """`x` in fp32 and dense."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
