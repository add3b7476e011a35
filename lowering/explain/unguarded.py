"""Methods of fake tensors on a CUDA device, for a PyTorch that was built without CUDA."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

aten = torch.ops.aten


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Has the methods of a tensor that ask for a device guard call the operators behind them.

    A PyTorch that was built without CUDA has no guard for CUDA devices, not even one that does
    nothing, and the methods whose bindings are written by hand ask for it even if the tensor is
    fake: indexing, `~`, `copy_`, `contiguous`, `nonzero` and `new_tensor`. The operators do not.
    """

    def instead(original: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *a, **k: (method if x.is_cuda else original)(x, *a, **k)

    with contextlib.ExitStack() as stack:
        for owner, name, method in METHODS:
            new = instead(getattr(owner, name), method)
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def contiguous(x: Tensor, *, memory_format: Any = torch.contiguous_format) -> Tensor:
    if x.is_contiguous(memory_format=memory_format):
        return x
    return aten.clone.default(x, memory_format=memory_format)


def copy(x: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
    return aten.copy_.default(x, as_tensor(source, x), non_blocking)


def nonzero(x: Tensor, *, as_tuple: bool = False) -> Any:
    found = aten.nonzero.default(x)
    return found.unbind(1) if as_tuple else found


def new_tensor(x: Tensor, data: Any, **options: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": x.dtype, "device": x.device, **options})


def get(x: Tensor, key: Any) -> Tensor:
    view, indices = indexed(x, key)
    if indices:
        return aten.index.Tensor(view, indices)
    return aten.alias.default(x) if view is x else view


def put(x: Tensor, key: Any, value: Any) -> None:
    view, indices = indexed(x, key)
    value = as_tensor(value, x)
    if indices:
        aten.index_put_.default(view, indices, value)
    else:
        aten.copy_.default(view, value)


def as_tensor(value: Any, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return aten.scalar_tensor.default(value, dtype=x.dtype, device=x.device)


def indexed(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """As much of `x[key]` as is a view, and what that is indexed with, as `aten.index` takes it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    keys = [torch.tensor(k, device=x.device) if isinstance(k, list) else k for k in keys]
    rest = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    keys[rest : rest + 1] = [slice(None)] * (x.dim() - sum(map(dimensions, keys)))
    indices: list[Tensor | None] = []
    dim = 0
    for k in keys:
        if isinstance(k, Tensor):
            indices.append(k)
            dim += dimensions(k)
        elif k is None or isinstance(k, (bool, slice)):
            if not isinstance(k, slice):
                x = aten.unsqueeze.default(x, dim)
            elif (k.start, k.stop, k.step) != (None, None, None):
                x = aten.slice.Tensor(x, dim, k.start, k.stop, 1 if k.step is None else k.step)
            indices.append(torch.tensor([k], device=x.device) if isinstance(k, bool) else None)
            dim += 1
        else:
            x = aten.select.int(x, dim, k)
    while indices and indices[-1] is None:
        indices.pop()
    return x, indices


def dimensions(key: Any) -> int:
    """How many dimensions of a tensor a part of a key is for."""
    if key is None or key is Ellipsis or isinstance(key, bool):
        return 0
    mask = isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8)
    return key.dim() if mask else 1


METHODS = (
    (Tensor, "__invert__", aten.bitwise_not.default),
    (Tensor, "contiguous", contiguous),
    (Tensor, "copy_", copy),
    (Tensor, "nonzero", nonzero),
    (torch, "nonzero", nonzero),
    (Tensor, "new_tensor", new_tensor),
    (Tensor, "__getitem__", get),
    (Tensor, "__setitem__", put),
)
