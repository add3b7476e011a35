"""`scan` over the columns of a head's state and over K more, which start from the identity: what
tokens read of the state before their sequence, and how it is left at its end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.kernels.scan import scan_values
from kda_ops.delta_rule.chunked.kernels.tiles import (
    first_state,
    scan_chunks,
    sequence_part,
    store_state,
)
from kda_ops.delta_rule.chunked.workspace import Batch, Workspace, at_least_one, stages
from kda_ops.delta_rule.state_layout import state_strides


@triton.jit
def chunk_scan_affine_kernel(
    tiles_ptr, u_ptr, decay_ptr, S_ptr, columns_ptr, o_ptr, reads_ptr, initial_ptr, final_ptr,
    transition_ptr, entered_ptr, cu_ptr,
    T, N, first_row, rows,
    initial_n, initial_h, initial_v, initial_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of one head's state through one sequence, like
    `chunk_scan_kernel`, or BV of the K others, without u, and from zero where nothing enters.
    Grid: (V blocks and K blocks * (sequence, head) pairs), blocks innermost.

    With SLABS it stores S at S_ptr [N, HV, KP, V], or columns_ptr [N, HV, KP, K], for the
    sequence's next slab.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    blocks: tl.constexpr = v_blocks + (K + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    pair = p // blocks
    n = pair // HV
    if n >= N:
        return
    h = pair % HV
    block = (p % blocks).to(tl.int32)
    b, start, end, row, lo, hi, begins, _ = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if SLABS and hi < lo:
        return
    d = tl.arange(0, KP)
    place = (h, b * T + start, (end - start).to(tl.int32), row)
    if block < v_blocks:
        v = block * BV + tl.arange(0, BV)
        initial = (initial_n, initial_h, initial_v, initial_k)
        final = (HV * (V * K), V * K, K, 1)
        carried = S_ptr + pair * (KP * V) + d[:, None] * V + v[None, :] if SLABS else None
        S = first_state(
            (initial_ptr, initial, final_ptr, final, None), carried, n, n, h, d, v, begins, K, V,
            SLABS, initial_ptr is not None, False, False,
        )  # fmt: skip
        memory = (tiles_ptr, u_ptr, decay_ptr, o_ptr)
        S = scan_chunks(memory, S, place, lo, hi, v, None, HV, K, V, KP, HALF, 0, STAGES, True)
        store_state(final_ptr, final, carried, S, True, n, h, d, v, K, V, True, SLABS)
        return
    v = (block - v_blocks) * BV + tl.arange(0, BV)
    carried = columns_ptr + pair * (KP * K) + d[:, None] * K + v[None, :] if SLABS else None
    one = d[:, None] == v[None, :]
    if entered_ptr is not None:
        one = one & (tl.load(entered_ptr + n) != 0)
    S = tl.where(one, 1.0, 0.0)
    if SLABS:
        S = tl.where(begins, S, 0.0)
        S += tl.load(carried, mask=(v < K)[None, :] & (begins == 0), other=0.0)
    memory = (tiles_ptr, u_ptr, decay_ptr, reads_ptr)
    S = scan_chunks(memory, S, place, lo, hi, v, None, HV, K, K, KP, HALF, 0, STAGES, True, False)
    strides = (HV * (K * K), K * K, K, 1)
    store_state(transition_ptr, strides, carried, S, True, n, h, d, v, K, K, True, SLABS)


def launch_scan_affine(
    o: Tensor, reads: Tensor, workspace: Workspace, columns: Tensor | None, batch: Batch,
    initial_state: Tensor | None, entered: Tensor | None, final: Tensor, transition: Tensor,
) -> None:  # fmt: skip
    """Writes the output to `o`, what is read to `reads`, and both states. Not in fp32."""
    (HV, V), K, KP = o.shape[2:], reads.shape[3], workspace.columns
    pairs = HV * at_least_one(batch.N)
    # twice the columns: as for twice the pairs
    chosen = scan_values(K, max(K, V), 2 * pairs, o)
    u = o if workspace.u is None else workspace.u
    depth = stages(3 * KP + CHUNK, KP, chosen["BV"], u.element_size(), o.device)
    chosen["STAGES"] = min(chosen["STAGES"], depth)
    blocks = triton.cdiv(V, chosen["BV"]) + triton.cdiv(K, chosen["BV"])
    traceable(chunk_scan_affine_kernel)[(blocks * pairs,)](
        *workspace, columns, o, reads, initial_state, final, transition, contiguous(entered),
        *batch.sequences, *state_strides(initial_state),
        HV=HV, K=K, V=V, KP=KP, **batch.constants, HALF=o.dtype == torch.float16, **chosen,
    )  # fmt: skip
