"""The second kernel of chunked KDA: carries the state through the prepared chunks, in 16 bits and
in full fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops._numerics import CHUNK
from kda_ops.blocks import block_arguments
from kda_ops.delta_rule.chunked.kernels.scan_segments import (
    launch_segments,
    segment_chunks,
    segment_count,
    segment_state,
)
from kda_ops.delta_rule.chunked.kernels.tiles import (
    at_boundary,
    boundaries_of,
    boundary_page,
    clear_sequence,
    first_state,
    full_dot,
    page_of,
    scan_chunks,
    sequence_part,
    store_state,
    tiles_of,
)
from kda_ops.delta_rule.chunked.states import States
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    Workspace,
    at_least_one,
    programs_key,
    stages,
)
from kda_ops.delta_rule.state_layout import state_strides
from kda_ops.tuning import choose


@triton.jit
def chunk_scan_kernel(
    tiles_ptr, u_ptr, decay_ptr, S_ptr, E_ptr, M_ptr, o_ptr, initial_ptr, final_ptr, indices_ptr,
    has_initial_ptr, cu_ptr, blocks_ptr, contexts_ptr,
    T, N, first_row, rows, slots, columns, first_pair,
    initial_n, initial_h, initial_v, initial_k, final_n, final_h, final_v, final_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    PAGED: tl.constexpr, HAS_INITIAL: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HALF: tl.constexpr,
    SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of one head's state through one sequence, S [KP, BV] in fp32
    registers. Grid: (V blocks * (sequence, head) pairs from first_pair on), V blocks innermost: the
    programs of one head read the same w, kg, qg and Aqk at about the same time.

    With HALF (fp16 inputs) the operands S and vn are scaled by column, so that no value overflows.
    With SLABS it processes the chunks of one slab and stores S at S_ptr for the sequence's next
    slab. With SEGMENTS > 1 it processes one segment of them, not the first, starting from the S of
    `chunk_segments_kernel`; segments are outermost in the grid.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    pair = p // blocks + first_pair
    if SEGMENTS > 1:
        segment = pair // tl.maximum(N * HV, 1) + 1
        pair -= (segment - 1) * (N * HV)
    n = pair // HV
    if n >= N:
        return
    h = pair % HV
    v = (p % blocks).to(tl.int32) * BV + tl.arange(0, BV)
    b, start, end, row, lo, hi, begins, _ = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if SLABS and hi < lo:
        return
    if SEGMENTS > 1:
        lo, hi, ends = segment_chunks(lo, hi, segment, SEGMENTS)
        if hi <= lo:
            return
    page, live = page_of(indices_ptr, n, slots, PAGED)
    if live == 0:
        if SEGMENTS == 1:
            clear_sequence(o_ptr, b, start, end, h, T, v, HV, V)
        return
    d = tl.arange(0, KP)
    memory = (tiles_ptr, u_ptr, decay_ptr, o_ptr)
    place = (h, b * T + start, (end - start).to(tl.int32), row)
    initial = (initial_n, initial_h, initial_v, initial_k)
    final = (final_n, final_h, final_v, final_k)
    states = (initial_ptr, initial, final_ptr, final, has_initial_ptr)
    if SLABS:
        carried = S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :]
    if SEGMENTS > 1:
        S = segment_state(E_ptr, M_ptr, pair, segment, d, v, KP, V, SEGMENTS, STAGES)
    else:
        S = first_state(
            states, carried if SLABS else None, n, page, h, d, v, begins, K, V,
            SLABS, INITIAL, PAGED, HAS_INITIAL,
        )  # fmt: skip

    boundaries = None
    if BLOCK_TOKENS > 0:
        boundaries = boundaries_of(blocks_ptr, contexts_ptr, columns, final_ptr, final, slots, n)
    S = scan_chunks(
        memory, S, place, lo, hi, v, boundaries, HV, K, V, KP, HALF, BLOCK_TOKENS, STAGES, True
    )
    store_state(
        final_ptr, final, carried if SLABS else None, S, ends if SEGMENTS > 1 else True, page, h, d,
        v, K, V, FINAL, SLABS,
    )  # fmt: skip


@triton.jit
def chunk_scan_fp32_kernel(
    tiles_ptr, u_ptr, decay_ptr, S_ptr, o_ptr, initial_ptr, final_ptr, indices_ptr, has_initial_ptr,
    cu_ptr, blocks_ptr, contexts_ptr,
    T, N, first_row, rows, slots, columns,
    initial_n, initial_h, initial_v, initial_k, final_n, final_h, final_v, final_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, PAGED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of one head's state through one sequence, in full fp32. Grid:
    (V blocks * HV * N).

    Dots in full fp32 run on FMA units, so the state is kept in memory (S [N, HV, KP, V]), and vn
    over u, and both are processed in blocks of BLOCK rows, with a barrier before and after each
    read of what the program itself wrote.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    n = p // (blocks * HV)
    if n >= N:
        return
    h = (p // blocks) % HV
    v = (p % blocks).to(tl.int32) * BV + tl.arange(0, BV)
    b, start, end, row, lo, hi, begins, _ = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if SLABS and hi < lo:
        return
    page, live = page_of(indices_ptr, n, slots, PAGED)
    if live == 0:
        clear_sequence(o_ptr, b, start, end, h, T, v, HV, V)
        return
    final = (final_n, final_h, final_v, final_k)
    boundaries = None
    if BLOCK_TOKENS > 0:
        boundaries = boundaries_of(blocks_ptr, contexts_ptr, columns, final_ptr, final, slots, n)
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    in_v = (v < V)[None, :]
    S_at = S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :]
    read = in_v
    if HAS_INITIAL:
        read = in_v & (tl.load(has_initial_ptr + n) != 0)
    fresh = KP
    if SLABS:
        fresh = tl.where(begins, KP, 0)
    for k0 in range(0, fresh, BLOCK):
        keys = (k0 + d)[:, None]
        S = tl.zeros((BLOCK, BV), tl.float32)
        if PAGED:
            at = page * final_n + h * final_h + keys * final_k + v[None, :] * final_v
            S = tl.load(final_ptr + at, mask=read & (keys < K), other=0.0).to(tl.float32)
        elif INITIAL:
            at = n * initial_n + h * initial_h + keys * initial_k + v[None, :] * initial_v
            S = tl.load(initial_ptr + at, mask=in_v & (keys < K), other=0.0).to(tl.float32)
        tl.store(S_at + k0 * V, S, mask=in_v)
    tl.debug_barrier()

    for c in range(lo, hi):
        work = (row + c) * HV + h
        w_ptr, kg_ptr, qg_ptr, A_ptr = tiles_of(tiles_ptr, work, KP)
        tile = r[:, None] * KP + d[None, :]
        u_at = u_ptr + work * (64 * V) + v[None, :]
        vn = tl.load(u_at + r[:, None] * V, mask=in_v, other=0.0)
        o = tl.zeros((64, BV), tl.float32)
        for k0 in range(0, KP, BLOCK):
            S = tl.load(S_at + k0 * V, mask=in_v, other=0.0)
            vn -= full_dot(tl.load(w_ptr + tile + k0), S)
            o += full_dot(tl.load(qg_ptr + tile + k0), S)
        tl.debug_barrier()
        tl.store(u_at + r[:, None] * V, vn, mask=in_v)
        tl.debug_barrier()
        for r0 in range(0, 64, BLOCK):
            part = tl.load(u_at + (r0 + d)[:, None] * V, mask=in_v, other=0.0)
            o += full_dot(tl.load(A_ptr + r[:, None] * 64 + (r0 + d)[None, :]), part)
        t = start + c * 64 + r
        tl.store(
            o_ptr + ((b * T + t)[:, None] * HV + h) * V + v[None, :],
            o,
            mask=(t < end)[:, None] & in_v,
        )
        for k0 in range(0, KP, BLOCK):
            S = (
                tl.load(S_at + k0 * V, mask=in_v, other=0.0)
                * tl.load(decay_ptr + work * KP + k0 + d)[:, None]
            )
            kg_at = kg_ptr + (k0 + d)[:, None]
            for r0 in range(0, 64, BLOCK):
                part = tl.load(u_at + (r0 + d)[:, None] * V, mask=in_v, other=0.0)
                S += full_dot(tl.load(kg_at + (r0 + d)[None, :] * KP), part)
            tl.debug_barrier()
            tl.store(S_at + k0 * V, S, mask=in_v)
        tl.debug_barrier()
        if BLOCK_TOKENS > 0:
            ends = at_boundary(boundaries, c, end - start, BLOCK_TOKENS)
            if ends:
                block, named = boundary_page(boundaries, c, BLOCK_TOKENS)
                copy_state(
                    final_ptr, final, S_at, block, h, d, v, in_v, in_v & named, K, V, KP, BLOCK
                )
    if FINAL:
        copy_state(final_ptr, final, S_at, page, h, d, v, in_v, in_v, K, V, KP, BLOCK)


@triton.jit
def copy_state(
    final_ptr, final, S_at, page, h, d, v, in_v, stored, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes columns v of a head's state, kept at S_at in blocks of rows d, to its page: those in
    `stored`, of which all are `in_v`.
    """
    final_n, final_h, final_v, final_k = final
    final_at = final_ptr + page * final_n + h * final_h + v[None, :] * final_v
    for k0 in range(0, KP, BLOCK):
        keys = (k0 + d)[:, None]
        S = tl.load(S_at + k0 * V, mask=in_v, other=0.0)
        S = S.to(final_ptr.dtype.element_ty)
        tl.store(final_at + keys * final_k, S, mask=stored & (keys < K))


def scan_values(K: int, V: int, programs: Any, o: Tensor) -> dict[str, Any]:
    """The tuned values of `scan` by its number of (sequence, head) pairs.

    BV, the state columns per program, is at most V.
    """
    key = programs_key(programs)
    chosen = choose("chunk_scan", o.device, K=K, V=V, programs=key, dtype=o.dtype)
    return {**chosen, "BV": min(chosen["BV"], max(16, triton.next_power_of_2(V)))}


def scan_groups(K: int, V: int, batch: Batch, o: Tensor) -> list[tuple[Any, Any]]:
    """First and number of the (sequence, head) pairs of each launch.

    A program usually occupies a whole multiprocessor, so a few pairs left over after the last full
    wave would take as long as a wave. They get their own launch in narrower blocks, which fill the
    GPU and are faster. Not with `cu_seqlens`: the pairs left over may be the longest.
    """
    pairs = batch.N * o.shape[2]
    if o.device.type == "cuda" and isinstance(pairs, int) and batch.cu_seqlens is None:
        blocks = triton.cdiv(V, scan_values(K, V, pairs, o)["BV"])
        properties = torch.cuda.get_device_properties(o.device)
        full = max(properties.multi_processor_count // blocks, 1)
        rest = pairs % full
        if full < pairs and 0 < rest <= 32:
            return [(0, pairs - rest), (pairs - rest, rest)]
    return [(0, pairs)]


def launch_scan(o: Tensor, workspace: Workspace, batch: Batch, K: int, states: States) -> None:
    """Writes the output to `o`, and the final states."""
    HV, V = o.shape[2:]
    KP = workspace.columns
    initial, final, indices, has_initial, paged, state_layout, blocks = states
    sizes: dict[str, Any] = dict(
        HV=HV, K=K, V=V, KP=KP, **batch.constants, INITIAL=initial is not None,
        FINAL=final is not None, PAGED=paged, HAS_INITIAL=has_initial is not None,
        BLOCK_TOKENS=0 if blocks is None else blocks.tokens,
    )  # fmt: skip
    slots = 0 if final is None else final.shape[0]
    cu_seqlens, *counts = batch.sequences
    ends, columns = block_arguments(blocks)
    tables = (
        contiguous(indices), contiguous(has_initial), cu_seqlens, *ends, *counts, slots, columns,
    )  # fmt: skip
    strides = state_strides(initial, final, state_layout=state_layout)
    pairs = HV * at_least_one(batch.N)
    if o.dtype == torch.float32:
        chosen = choose("chunk_scan_fp32", o.device)
        traceable(chunk_scan_fp32_kernel)[(triton.cdiv(V, chosen["BV"]) * pairs,)](
            *workspace, o, initial, final, *tables, *strides, **sizes, **chosen
        )
        return
    u = o if workspace.u is None else workspace.u
    segments = segment_count(K, V, batch, o)
    sizes |= {"HALF": o.dtype == torch.float16, "SEGMENTS": segments}
    groups = scan_groups(K, V, batch, o) if segments == 1 else [(0, pairs * (segments - 1))]
    for first, programs in groups:
        chosen = scan_values(K, V, programs, o)
        depth = stages(3 * KP + CHUNK, KP, chosen["BV"], u.element_size(), o.device)
        chosen["STAGES"] = min(chosen["STAGES"], depth)
        found: tuple[Tensor | None, ...] = (None, None)
        if segments > 1:
            arguments = (o, initial, final, *tables, *strides)
            found = launch_segments(workspace, batch, chosen, arguments, sizes)
        traceable(chunk_scan_kernel)[(triton.cdiv(V, chosen["BV"]) * at_least_one(programs),)](
            *workspace, *found, o, initial, final, *tables, first, *strides, **sizes, **chosen
        )
