"""The launches of both chunked operators: `prepare` and `scan`, for every slab of the workspace."""

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.kernels.scan import launch_scan
from kda_ops.delta_rule.chunked.states import States, identity_states
from kda_ops.delta_rule.chunked.workspace import Batch, Prepare, make_workspace


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


def launch_chunks_affine(
    q: Tensor, v: Tensor, batch: Batch, prepare: Prepare, initial_state: Tensor | None,
    entered: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `chunk_kda_gated_affine` returns: after one `prepare` a `scan` over the columns of the
    state, and one over K more, which start from the identity, with u = 0.
    """
    parts = batch.slabs(q, v)
    workspace = make_workspace(q, v, parts[0])
    N, (HV, V), K = batch.N, v.shape[2:], q.shape[3]

    def make(like: Tensor, width: int) -> Tensor:
        return torch.empty((*like.shape[:-1], width), dtype=like.dtype, device=like.device)

    o = make(v, V)
    # also the u of its scan where `workspace.u` is None, and zero in padding
    reads = torch.zeros((*v.shape[:3], K), dtype=v.dtype, device=v.device)
    final = torch.empty((N, HV, V, K), dtype=torch.float32, device=v.device)
    transition = torch.empty((N, HV, K, K), dtype=torch.float32, device=v.device)
    identity = identity_states(N, HV, K, entered, torch.float32, v.device)
    carried = None if workspace.S is None else make(workspace.S, K)
    for part in parts:
        prepare(o, workspace, part)
        launch_scan(o, workspace, part, K, States(initial_state, final))
        u = workspace.u
        if u is not None:  # fp32 scans write to it
            u = torch.zeros((*u.shape[:-1], K), dtype=u.dtype, device=u.device)
        columns = workspace._replace(u=u, S=carried)
        launch_scan(reads, columns, part, K, States(identity, transition))
    return o, reads, final, transition
