"""The KDA layer as other projects write it, on this package's operators where they have kernels.

Own code in their style, not theirs: what someone would have who ported such a layer with the least
change. The modules take checkpoints of their project.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Cache:
    """States of the sequences of a batch, and where they are.

    Attributes:
        conv: Of the convolution: one tensor, or one each of q, k and v; layout SD or DS.
        recurrent: `[slots, HV, V, K]`.
        state_indices: `[N]`, of each sequence.
        has_initial_state: `[N]`, bool; only looked at in a prefill.
        layout: Of `conv`.
    """

    conv: Any
    recurrent: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    layout: str = "SD"


def conv_state(pages: int, rows: int, width: int, layout: str, like: Tensor) -> Tensor:
    """A convolution state of zeros, in the dtype and on the device of `like`."""
    return like.new_zeros((pages, rows, width) if layout == "SD" else (pages, width, rows))


def in_bf16(module: nn.Module) -> nn.Module:
    """A module in bf16 but for the parameters of its gate."""
    for name, parameter in module.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    return module
