"""`A_log` and `dt_bias` in fp32 under FSDP2 (`torch.distributed.fsdp.fully_shard`).

FSDP2 gathers and reduces parameters in groups of one dtype. It rejects a group of bf16 weights with
a gate in fp32, and under a `MixedPrecisionPolicy` it casts the gate to bf16 as well. The gate's
parameters are exempted here: they are gathered unchanged, in the same collective as the others, and
only their gradients are reduced in the group's dtype and widened afterwards.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

EXACT = ("A_log", "dt_bias")


def sharded_by(hook: Callable[..., Any]) -> Iterator[Any]:
    """FSDP2's parameter objects in the closure of a hook.

    FSDP2 registers a hook with the module of each parameter it manages, which is the only place to
    reach it before its groups are made.
    """
    for cell in getattr(hook, "__closure__", None) or ():
        if type(cell.cell_contents).__name__ == "FSDPParam":
            yield cell.cell_contents


def is_fsdp_hook(hook: Callable[..., Any]) -> bool:
    """Whether FSDP2 registers a hook for a parameter that it shards."""
    return any(True for _ in sharded_by(hook))


def keep_exact(hook: Callable[..., Any]) -> None:
    """Marks the hook's parameter, if it is FSDP2's and a parameter of the gate."""
    for taken in sharded_by(hook):
        if taken._module_info.param_name in EXACT:
            taken.__class__ = _exact_param()


@functools.cache
def _exact_param() -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    class ExactFSDPParam(FSDPParam):
        """A parameter that keeps its dtype in a group of another dtype."""

        def init_dtype_attrs(self, mp_policy: Any) -> None:
            super().init_dtype_attrs(mp_policy)
            # another parameter of the same group: same module, not a gate's
            group = self._module_info.module.o_norm_weight.dtype
            self.group_dtype = mp_policy.param_dtype or group
            self.orig_dtype, self.param_dtype = group, None

        def init_unsharded_param(self) -> None:
            super().init_unsharded_param()
            if self._unsharded_param.requires_grad:
                self._unsharded_param.grad_dtype = self.group_dtype

        @property
        def unsharded_zero_grad_data(self) -> torch.Tensor:
            return super().unsharded_zero_grad_data.to(self.group_dtype)

        def to_sharded_dtensor(self, tensor: torch.Tensor) -> Any:
            return super().to_sharded_dtensor(tensor.to(self.sharded_param.dtype))

    return ExactFSDPParam
