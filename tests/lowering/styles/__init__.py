"""The KDA layer in the style of other projects, on this package's operators where those have
kernels.

Our code in their style: what a minimal port of such a layer would look like. The modules load
checkpoints of their project.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Cache:
    """States of the sequences of a batch, and their slots.

    Attributes:
        conv: Convolution state: one tensor, or one each for q, k and v; layout SD or DS.
        recurrent: `[slots, HV, V, K]`.
        state_indices: `[N]`, slot of each sequence.
        has_initial_state: `[N]`, bool; used only in a prefill.
        layout: Layout of `conv`.
    """

    conv: Any
    recurrent: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    layout: str = "SD"


def conv_state(pages: int, rows: int, width: int, layout: str, like: Tensor) -> Tensor:
    """A zeroed convolution state, with the dtype and device of `like`."""
    return like.new_zeros((pages, rows, width) if layout == "SD" else (pages, width, rows))


def in_bf16(module: nn.Module) -> nn.Module:
    """A module in bf16, except the parameters of its gate."""
    for name, parameter in module.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    return module
