"""How a launcher calls its Triton kernel, eagerly and while a lowering traces the launcher."""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def traceable(kernel: Any) -> Any:
    """The kernel itself, or, while a lowering traces the launcher, a proxy that records the launch
    in the graph.

    A launcher writes `traceable(x_kernel)[grid](...)`. Run eagerly, it launches. Traced
    (`kda_ops.lowering.inline`), the launch becomes its own Inductor node: the generated code
    launches the kernel directly, by name, and allocates its outputs and workspace from the graph's
    memory plan.
    """
    if get_proxy_mode() is None:
        return kernel
    return torch.library.wrap_triton(kernel)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
