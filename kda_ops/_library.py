"""What stands between `torch.library` and the registry of operators: schemas, implementations by
device, launchers that are imported on their first call, arguments by name.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from kda_ops import tuning
from kda_ops._checks import check_kernel_dtype
from kda_ops._roles import Role

NAMESPACE = "kda_ops"
REFERENCE_NAMESPACE = "kda_ops_reference"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
REFERENCE_LIBRARY = torch.library.Library(REFERENCE_NAMESPACE, "DEF")

Parameters = dict[str, Role | None]  # the arguments of an operator, in order, with their roles


def define(
    schema: str, tags: tuple[torch.Tag, ...] = (), library: torch.library.Library = LIBRARY
) -> Any:
    """A new operator, not yet implemented."""
    library.define(schema, tags=tuple(dict.fromkeys((torch.Tag.pt2_compliant_tag, *tags))))
    packet, _, overload = schema[: schema.index("(")].partition(".")
    return getattr(getattr(getattr(torch.ops, library.ns), packet), overload or "default")


def name_of(op: Any) -> str:
    """An operator's name in its library, such as `short_conv.state`."""
    name = op._schema.name.partition("::")[2]
    return ".".join(filter(None, (name, op._schema.overload_name)))


def implement(
    library: torch.library.Library,
    op: Any,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    def autocast_impl(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return op(*args)

    name = name_of(op)
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")
    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(name, autocast_impl, key)
    implement_fake(library, name, fake)


def implement_fake(library: torch.library.Library, name: str, fake: Callable[..., Any]) -> None:
    """`torch.library.register_fake`, but for a look at the caller's source, which takes a fifth of
    the time of `import kda_ops`.
    """
    entry = torch._library.simple_registry.singleton.find(f"{library.ns}::{name}")
    handle = entry.fake_impl.register(fake, fake.__module__, lib=library)
    library._registration_handles.append(handle)


def tensors_at(op: Any, places: list[int]) -> Callable[[tuple[Any, ...]], Any]:
    """A function that picks the tensors at some positions of an operator's arguments."""
    if places and all(str(op._schema.arguments[i].type) == "Tensor" for i in places):
        return itemgetter(*places)

    def tensors(args: tuple[Any, ...]) -> list[Tensor]:
        values = [args[i] if isinstance(args[i], (list, tuple)) else [args[i]] for i in places]
        return [x for value in values for x in value if x is not None]

    return tensors


def by_name(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Wraps a function to take all of an operator's arguments, in order, and pass on those that it
    declares. Raises `TypeError` for a parameter that is not an argument of the operator.
    """
    declared = list(inspect.signature(function).parameters.values())
    if any(x.kind is x.VAR_POSITIONAL for x in declared) or [x.name for x in declared] == names:
        return function
    declared = [x for x in declared if x.name in names or x.default is x.empty]
    unknown = [x.name for x in declared if x.name not in names]
    if unknown:
        raise TypeError(f"{function.__qualname__} declares {unknown}, the operator has {names}")
    places = [names.index(x.name) for x in declared]
    if len(places) == 1:
        (place,) = places
        return functools.wraps(function)(lambda *args: function(args[place]))
    pick = itemgetter(*places) if places else lambda args: ()
    return functools.wraps(function)(lambda *args: function(*pick(args)))


def with_roles(op: Any, roles: Mapping[str, Role]) -> Parameters:
    names = [x.name for x in op._schema.arguments]
    unknown = [name for name in roles if name not in names]
    if unknown:
        raise TypeError(f"roles of {op.name()} name {unknown}, the operator has {names}")
    return {name: roles.get(name) for name in names}


def lazy(target: str, parameters: Parameters) -> Callable[..., Any]:
    """A function that imports `module:function` on its first call.

    While the function runs, kernels are tuned for its call.
    """
    module, _, attribute = target.partition(":")
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            function = getattr(importlib.import_module(module), attribute)
            found.extend((function, by_name(function, list(parameters))))
        with tuning.calling(found[0], parameters, args):
            return found[1](*args)

    return call


def refuse_fp64(names: Sequence[str], tensors: Sequence[int], args: tuple[Any, ...]) -> None:
    for i in tensors:
        x = args[i]
        if isinstance(x, Tensor) and x.dtype is torch.float64:
            check_kernel_dtype(names[i], x)
