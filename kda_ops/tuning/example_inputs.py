"""Arguments on which an operator can be timed, made from those of a call: the real ones, or the
fake ones of a trace.

Shapes, strides and dtypes are those of the call, with the hint of a symbolic size. Floating-point
values are random; the values of tables are such that every sequence, slot and row has work to do.
Pages are as many as the call's slots: a copy of a whole cache might not fit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK
from kda_ops._tracing import hint as symbolic_hint
from kda_ops.varlen import prepare_chunk_indices

PAGES = ("conv_state", "q_state", "k_state", "v_state", "state", "conv", "recurrent")
SLOTS = ("state_indices",)


class NoHintError(Exception):
    """A size of which nothing is known yet."""


def hint(x: Any) -> int:
    """A size as a number.

    Raises:
        NoHintError: It depends on the values of tensors.
    """
    if isinstance(x, int):
        return x
    known = symbolic_hint(x)
    if known is None:
        raise NoHintError(str(x))
    return known


def examples(names: Sequence[str], arguments: Sequence[Any], device: torch.device) -> list[Any]:
    """Arguments to time the call on; `names` are those of the operator's schema.

    Raises:
        NoHintError: A size is not known.
    """
    call = dict(zip(names, arguments, strict=True))
    generator = torch.Generator(device).manual_seed(0)
    return [_example(name, call, device, generator) for name in names]


def _example(
    name: str, call: Mapping[str, Any], device: torch.device, generator: torch.Generator
) -> Any:
    x = call[name]
    if isinstance(x, torch.SymInt):
        return hint(x)
    if isinstance(x, (list, tuple)):
        return [_example(name, {**call, name: item}, device, generator) for item in x]
    if not isinstance(x, Tensor):
        return x
    shape, stride = [hint(n) for n in x.shape], [hint(n) for n in x.stride()]
    if name in PAGES:
        axis = 1 if "plan" in call and x.dim() == (4 if name == "conv" else 5) else 0
        shape[axis] = min(shape[axis], _slots_used(call) + 1)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flat = torch.zeros(0 if math.prod(shape) == 0 else extent, dtype=x.dtype, device=device)
    if x.is_floating_point():
        flat.normal_(generator=generator)
    out = flat.as_strided(shape, stride)
    if x.is_floating_point() or name in PAGES or out.numel() == 0:
        return out
    table = _table(name, out, call).to(x.dtype)
    return table if 0 in stride else out.copy_(table)


def _slots_used(call: Mapping[str, Any]) -> int:
    """Pages that the call reads and writes."""
    for name in SLOTS:
        if call.get(name) is not None:
            return math.prod(hint(n) for n in call[name].shape)
    return 2 * hint(call["plan"].shape[0]) if "plan" in call else 0


def _table(name: str, like: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Values of an integer argument of the shape of `like`."""
    n = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    if name in SLOTS:
        return n + 1  # slot 0 is the null block
    if name == "cu_seqlens":
        return n * _tokens(call) // max(like.numel() - 1, 1)
    if name == "chunk_indices":
        offsets = torch.arange(hint(call["cu_seqlens"].shape[0]), device=like.device)
        offsets = offsets * _tokens(call) // max(len(offsets) - 1, 1)
        return prepare_chunk_indices(offsets, _tokens(call), call.get("chunk_size", CHUNK))
    if name == "plan":  # two sources, target, bias
        row = torch.arange(like.shape[0], device=like.device)
        return torch.stack([2 * row + 1, 2 * row + 1, 2 * row + 2, 0 * row], dim=1)
    return torch.ones_like(like)  # every sequence has an initial state, and one token accepted


def _tokens(call: Mapping[str, Any]) -> int:
    """T of the call's first tensor: `[B, T, ...]`, or `[T, D]` where it has two axes."""
    x = next(x for x in call.values() if isinstance(x, Tensor))
    return hint(x.shape[0 if x.dim() == 2 else 1])
