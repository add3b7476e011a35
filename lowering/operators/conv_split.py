"""The parts of a convolution state are pointwise reads of it, made where they are used.

Each is an unrealised copy, not a view: when the graph writes the state later, Inductor realises the
reads made before, which it cannot do for a view.
"""

from typing import Any

import torch
from torch._inductor.lowering import lowerings

from kda_ops.cache.conv_split.op import conv_split_op
from kda_ops.lowering.inline import lowers

aten = torch.ops.aten


@lowers(conv_split_op)
def lower_conv_split(conv_state: Any, sizes: Any, layout: str) -> Any:
    parts, start = [], 0
    for size in sizes:
        part = lowerings[aten.slice.Tensor](
            conv_state, 2 if layout == "SD" else 1, start, start + size
        )
        parts.append(lowerings[aten.clone.default](part))
        start = start + size
    return parts
