"""flash-linear-attention, which warns when it is imported without a GPU, and the definitions of
what its KDA functions compute, in plain PyTorch.
"""

import contextlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("fla.models.kda")
    from fla.layers import KimiDeltaAttention
    from fla.models.utils import Cache
    from fla.modules import FusedRMSNormGated, ShortConvolution

__all__ = ["Cache", "FusedRMSNormGated", "KimiDeltaAttention", "ShortConvolution"]


def names() -> dict[tuple[str, str], Any]:
    """What every name of every loaded module of FLA stands for, with the methods of its classes."""
    found: dict[tuple[str, str], Any] = {}
    for place, module in list(sys.modules.items()):
        if place.partition(".")[0] != "fla":
            continue
        for name, value in list(vars(module).items()):
            found[place, name] = value
            if inspect.isclass(value) and value.__module__.startswith("fla"):
                found |= {(place, f"{name}.{x}"): y for x, y in vars(value).items()}
    return found


def gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    """The gate in nats."""
    z = g + dt_bias.view(g.shape[-2:])
    rate = 1.0 if A_log is None else A_log.exp()[:, None]
    return -rate * F.softplus(z) if lower_bound is None else lower_bound * torch.sigmoid(rate * z)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token: `o [B, T, HV, V]` and the state after each, `[B, T, HV, K, V]`."""
    B, T, HV, V = v.shape
    K, groups = q.shape[-1], HV // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    S = v.new_zeros(B, HV, K, V) if state is None else state
    outputs, states = [], []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S
        read = (k[:, t, :, :, None] * S).sum(-2)
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - read))[..., None, :]
        outputs.append(K**-0.5 * (q[:, t, :, :, None] * S).sum(-2))
        states.append(S)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Of one sequence `[T, D]` after a state `[D, W]`: the result, and the last W tokens."""
    D, W = weight.shape
    rows = torch.cat([x.new_zeros(D, W) if state is None else state, x.mT], dim=-1)
    if len(x) == 0:
        return x, rows
    y = F.conv1d(rows[None, :, 1:], weight[:, None], bias, groups=D)[0].mT
    return (F.silu(y) if activation else y), rows[:, -W:]


@contextlib.contextmanager
def registered(register: Callable[[], None], backend: str) -> Iterator[None]:
    """`register` for the length of a block."""
    from fla.backends import _function_registries, _operation_registries

    register()
    try:
        yield
    finally:
        for registry in (*_function_registries.values(), *_operation_registries.values()):
            registry._backends.pop(backend, None)
