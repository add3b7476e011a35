"""The launches of both chunked operators: `prepare` and `scan`, for every slab of the workspace."""

import torch
from torch import Tensor

from kda_ops.delta_rule.chunked.kernels import scan
from kda_ops.delta_rule.chunked.kernels.scan import launch_scan
from kda_ops.delta_rule.chunked.kernels.scan_affine import launch_scan_affine
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
    """What `chunk_kda_gated_affine` returns: after `prepare` a `scan` over the columns of the state
    and over K more, which start from the identity, with u = 0. In fp32, and for few heads, whose
    sequences are scanned in segments, a scan of each.
    """
    parts = batch.slabs(q, v)
    workspace = make_workspace(q, v, parts[0])
    N, (HV, V), K = batch.N, v.shape[2:], q.shape[3]

    def state(height: int) -> Tensor:
        return torch.empty((N, HV, height, K), dtype=torch.float32, device=v.device)

    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final, transition = state(V), state(K)
    columns = None
    if workspace.S is not None:
        shape = (*workspace.S.shape[:3], K)
        columns = torch.empty(shape, dtype=torch.float32, device=v.device)
    separate = q.dtype == torch.float32 or scan.segment_count(K, V, batch, o) > 1
    # zero in padding; if separate also the u of its scan, where `workspace.u` is None
    make = torch.zeros if separate or batch.cu_seqlens is not None else torch.empty
    reads = make((*v.shape[:3], K), dtype=v.dtype, device=v.device)
    identity = identity_states(N, HV, K, entered, torch.float32, v.device) if separate else None
    for part in parts:
        prepare(o, workspace, part)
        if not separate:
            launch_scan_affine(
                o, reads, workspace, columns, part, initial_state, entered, final, transition
            )  # fmt: skip
            continue
        launch_scan(o, workspace, part, K, States(initial_state, final))
        u = workspace.u
        if u is not None:  # which fp32 scans overwrite
            u = torch.zeros((*u.shape[:-1], K), dtype=u.dtype, device=u.device)
        others = workspace._replace(u=u, S=columns)
        launch_scan(reads, others, part, K, States(identity, transition))
    return o, reads, final, transition
