"""In Triton's interpreter, a kernel that reads or writes outside its tensors fails, like under
compute-sanitizer but without a GPU. An address elsewhere in a tensor's storage (another tile of a
workspace), or in another of the launch's tensors, passes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def storages(arguments: Any) -> Iterator[torch.UntypedStorage]:
    for x in arguments:
        if isinstance(x, tuple):
            yield from storages(x)
        elif isinstance(x, torch.Tensor):
            yield x.untyped_storage()


class Bounds:
    """The memory of the tensors of one launch."""

    def __init__(self, arguments: Any) -> None:
        import numpy as np

        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages(arguments)})
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self.ends = np.array([end for _, end in spans], dtype=np.uint64)

    def check(self, pointers: Any, mask: Any) -> None:
        """Raises an IndexError if an unmasked element is in no tensor."""
        import numpy as np

        places, mask = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        places = places[mask].astype(np.uint64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        if not places.size:
            return
        if not self.starts.size:
            raise IndexError("a launch without tensors reads or writes memory")
        tensor = np.searchsorted(self.starts, places, side="right").astype(np.int64) - 1
        inside = (tensor >= 0) & (places + np.uint64(size) <= self.ends[np.maximum(tensor, 0)])
        if not inside.all():
            raise IndexError(
                f"{(~inside).sum()} of {places.size} elements lie outside the kernel's tensors"
            )


@contextlib.contextmanager
def within_tensors() -> Iterator[None]:
    """Context manager: out-of-bounds accesses of kernels raise an IndexError."""
    from triton.runtime import interpreter

    bounds: list[Bounds] = []
    start = interpreter.GridExecutor._init_args_hst
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def started(self: Any, *args: Any) -> Any:
        positional, named = start(self, *args)
        bounds[:] = [Bounds([*positional, *named.values()])]
        return positional, named

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        bounds[0].check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        bounds[0].check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", started),
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
    ):
        yield
