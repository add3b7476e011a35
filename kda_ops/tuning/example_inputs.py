"""Arguments for timing an operator, modeled on those of a call: real ones, or the fake ones of a
trace.

Shapes, strides and dtypes are those of the call, with hints for symbolic sizes. The operator
declares the roles of its arguments (`kda_ops._roles`). Floating-point values are random; table
values give every sequence, slot and row work to do. There are only as many pages as the call uses:
a copy of a whole cache might not fit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK
from kda_ops._roles import BLOCKS, CHUNKS, CONTEXTS, COPIES, OFFSETS, SLOTS, Pages, Role
from kda_ops._tracing import hint as symbolic_hint
from kda_ops.varlen import prepare_chunk_indices

Call = list[tuple[Role | None, Any]]  # the arguments with their roles


class NoHintError(Exception):
    """A size without a hint."""


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


def examples(
    parameters: Mapping[str, Role | None], arguments: Sequence[Any], device: torch.device
) -> list[Any]:
    """Arguments for timing the call; `parameters` are the operator's, with their roles.

    Raises:
        NoHintError: A size is not known.
    """
    call = list(zip(parameters.values(), arguments, strict=True))
    sizes = dict(zip(parameters, arguments, strict=True))
    chunk = sizes.get("chunk_size", CHUNK)
    generator = torch.Generator(device).manual_seed(0)
    return [_example(role, x, call, chunk, generator) for role, x in call]


def _example(role: Role | None, x: Any, call: Call, chunk: int, generator: torch.Generator) -> Any:
    if isinstance(x, torch.SymInt):
        return hint(x)
    if isinstance(x, (list, tuple)):
        return [_example(role, item, call, chunk, generator) for item in x]
    if not isinstance(x, Tensor):
        return x
    shape, stride = [hint(n) for n in x.shape], [hint(n) for n in x.stride()]
    if isinstance(role, Pages):
        shape[role.axis] = min(shape[role.axis], _pages_used(call) + 1)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    empty = math.prod(shape) == 0
    flat = torch.zeros(0 if empty else extent, dtype=x.dtype, device=generator.device)
    if x.is_floating_point():
        flat.normal_(generator=generator)
    out = flat.as_strided(shape, stride)
    if x.is_floating_point() or isinstance(role, Pages) or out.numel() == 0:
        return out
    table = _table(role, out, call, chunk).to(x.dtype)
    return table if 0 in stride else out.copy_(table)


def _of_role(role: Role, call: Call) -> Any:
    """The argument with that role, None where the call has none."""
    return next((x for other, x in call if other is role), None)


def _pages_used(call: Call) -> int:
    """Number of pages that the call reads and writes."""
    slots, copies, offsets = (_of_role(role, call) for role in (SLOTS, COPIES, OFFSETS))
    if slots is not None:
        return math.prod(hint(n) for n in slots.shape)
    if copies is not None:
        return 2 * hint(copies.shape[0])
    if all(role is not SLOTS for role, _ in call):
        return 0
    # without slots sequence n is on page n
    first = next(x for _, x in call if isinstance(x, Tensor))
    return hint(first.shape[0]) if offsets is None else hint(offsets.shape[0]) - 1


def _table(role: Role | None, like: Tensor, call: Call, chunk: int) -> Tensor:
    """Values of an integer argument of the shape of `like`."""
    n = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    if role is SLOTS:
        return n + 1  # slot 0 is the null block
    if role is OFFSETS:
        return n * _tokens(call) // max(like.numel() - 1, 1)
    if role is CHUNKS:
        count = hint(_of_role(OFFSETS, call).shape[0])
        offsets = torch.arange(count, device=like.device) * _tokens(call) // max(count - 1, 1)
        return prepare_chunk_indices(offsets, _tokens(call), chunk)
    if role is BLOCKS:  # a block's page is its sequence's: other pages would take memory
        return n // like.shape[1] + 1
    if role is CONTEXTS:
        return torch.zeros_like(like)
    if role is COPIES:  # two sources, target, bias
        row = torch.arange(like.shape[0], device=like.device)
        return torch.stack([2 * row + 1, 2 * row + 1, 2 * row + 2, 0 * row], dim=1)
    return torch.ones_like(like)  # every sequence has an initial state, and one token accepted


def _tokens(call: Call) -> int:
    """T of the call's first tensor: `[B, T, ...]`, or `[T, D]` where it has two axes."""
    x = next(x for _, x in call if isinstance(x, Tensor))
    return hint(x.shape[0 if x.dim() == 2 else 1])
