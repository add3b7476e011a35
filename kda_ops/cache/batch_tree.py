"""`KDABatch` as a pytree of its tensors, in graphs and in exported programs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals
from torch.utils._pytree import GetAttrKey, register_pytree_node


def register_tree(cls: type, names: Sequence[str], counts: Sequence[str]) -> None:
    """Registers the class of batches, with the names of its tensors and of the counts that are
    sizes of the last one. Its constants are `"kind"`, or `"kind block_tokens"`.
    """

    def flatten(batch: Any) -> tuple[list[Tensor | None], str]:
        tokens = "" if batch.block_tokens is None else f" {batch.block_tokens}"
        return [getattr(batch, name) for name in names], batch.kind + tokens

    def flatten_with_keys(batch: Any) -> tuple[list[tuple[Any, Tensor | None]], str]:
        tensors, constants = flatten(batch)
        return [(GetAttrKey(name), x) for name, x in zip(names, tensors, strict=True)], constants

    def unflatten(tensors: Iterable[Any], constants: str) -> Any:
        """A batch in a trace: of tensors that were checked, or of their proxies."""
        batch: Any = object.__new__(cls)
        for name, x in zip(names, tensors, strict=True):
            batch._set(name, x)
        sizes = batch.counts.shape if isinstance(batch.counts, Tensor) else ()
        for name, size in zip(counts, sizes, strict=False):
            batch._set(name, size)
        kind, _, tokens = constants.partition(" ")
        batch._set("kind", kind)
        batch._set("block_tokens", int(tokens) if tokens else None)
        known = not torch.compiler.is_compiling() and all(type(size) is int for size in sizes)
        batch._set("_small", len(sizes) > 0 and known and batch._is_small())
        return batch

    register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name="kda_ops.cache.batch.KDABatch",
        flatten_with_keys_fn=flatten_with_keys,
    )
    add_safe_globals([cls])  # `torch.export.load` reads a program's example inputs
