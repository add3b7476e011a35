"""The launches of both chunked operators: `prepare` and `scan`, for every slab of the workspace."""

from collections.abc import Callable

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.kernels.scan import launch_scan
from kda_ops.delta_rule.chunked.states import States
from kda_ops.delta_rule.chunked.workspace import Batch, Workspace, make_workspace

Prepare = Callable[[Tensor, Workspace, Batch], None]


def launch_chunks(q: Tensor, v: Tensor, batch: Batch, prepare: Prepare, states: States) -> Tensor:
    """Returns the output and writes the final states. `prepare` fills the workspace for one part of
    the batch, or the output if u is there.
    """
    parts = batch.slabs(q, v)
    workspace = make_workspace(q, v, parts[0])
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for part in parts:
        prepare(o, workspace, part)
        launch_scan(o, workspace, part, q.shape[3], states)
    return o
