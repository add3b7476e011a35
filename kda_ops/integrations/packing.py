"""Projections of the same tokens as one GEMM, in a state dict under the names that they have apart.

A decode step is bound by the number of GEMMs: a KDA layer of transformers makes six of the same
tokens. Parameters are packed, so they train and move like others; what goes by a projection's name
(adapters, sharding plans, quantization) has to be applied before, and is then refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PACKED = "packed"


class PackedLinear(nn.Linear):
    """Several linear layers without bias, their outputs beside each other.

    Attributes:
        names: Of the layers, relative to the module that they belong to.
        sizes: Their output channels.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[nn.Linear]) -> None:
        weights = [part.weight for part in parts]
        self.sizes = [weight.shape[0] for weight in weights]
        like: Any = {"device": "meta", "dtype": weights[0].dtype}
        super().__init__(weights[0].shape[1], sum(self.sizes), bias=False, **like)
        self.names = list(names)
        rows = torch.cat([weight.detach() for weight in weights])
        self.weight = nn.Parameter(rows, requires_grad=weights[0].requires_grad)
        self.apart = list(parts)  # a list: their weights are no parameters of the model's any more
        for part in parts:
            part.weight = None


def check_packable(where: str, module: nn.Module, names: Sequence[str]) -> None:
    """Raises a ValueError for what `pack` would change the meaning of."""
    for name in names:
        part: Any = module.get_submodule(name)
        if type(part) is not nn.Linear or part.bias is not None:
            problem = f"{name} is no nn.Linear without a bias: {part}"
        elif type(part.weight) is not nn.Parameter or part.weight.is_meta:
            problem = f"{name}.weight is no plain parameter: {type(part.weight).__name__}"
        elif part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            problem = f"{name} has hooks, or a forward of its own"
        else:
            first: Any = module.get_submodule(names[0])
            same = ("dtype", "device", "requires_grad")
            differing = [x for x in same if getattr(part.weight, x) != getattr(first.weight, x)]
            if not differing:
                continue
            problem = f"{name}.weight differs from {names[0]}.weight in {', '.join(differing)}"
        raise ValueError(f"{where or 'model'} cannot be packed: {problem}")


def pack(module: nn.Module, names: Sequence[str]) -> None:
    """Replaces linear layers, given by their names within the module, by `module.packed`."""
    packed = PackedLinear(names, [module.get_submodule(name) for name in names])
    for name in names:
        parent, _, child = name.rpartition(".")
        # None keeps the place, so that `unpack` leaves the order of modules as it was
        module.get_submodule(parent)._modules[child] = None
    module.add_module(PACKED, packed)
    module.register_state_dict_post_hook(_split)
    module.register_load_state_dict_pre_hook(_join)


def unpack(module: Any) -> None:
    """Undoes `pack`, with the weights of now."""
    packed: PackedLinear = module.packed
    weights = packed.weight.detach().split(packed.sizes)
    for name, part, rows in zip(packed.names, packed.apart, weights, strict=True):
        part.weight = nn.Parameter(rows.clone(), requires_grad=packed.weight.requires_grad)
        part.train(packed.training)
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent)._modules[child] = part
    delattr(module, PACKED)
    _remove(module._state_dict_hooks, _split)
    _remove(module._load_state_dict_pre_hooks, _join)


def _remove(hooks: dict[int, Any], function: Any) -> None:
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[key]


def _split(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The packed weight under the names of its parts."""
    weight = state.pop(f"{prefix}{PACKED}.weight", None)
    if weight is not None:
        packed: PackedLinear = module.packed
        for name, rows in zip(packed.names, weight.split(packed.sizes), strict=True):
            state[f"{prefix}{name}.weight"] = rows


def _join(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The other way; if one is missing, they stay, and loading reports it."""
    keys = [f"{prefix}{name}.weight" for name in module.packed.names]
    if all(key in state for key in keys):
        state[f"{prefix}{PACKED}.weight"] = torch.cat([state.pop(key) for key in keys])
