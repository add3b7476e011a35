"""`scan` for few heads: a sequence's chunks in segments that are worked on at the same time.

A chunk takes S to T S + U, with T = diag(decay) - kg^T w and U = kg^T u, so a segment takes S to
M S + E with M the product of its T and E what it makes of zero. A first pass finds M and E of
every segment but the last, columns of both alike: those of M are states of a sequence without u
that begins with the unit matrix. Then each segment finds the state it begins with from the M and E
before it, and `scan` runs in all of them at once. The first pass makes two of `scan`'s four
products, for three times as many columns.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.choice import choose
from kda_ops.choice.examples import NoHintError, hint
from kda_ops.device.chunk.kernel import first_state, page_of, sequence_rows, slab_chunks, to_half
from kda_ops.device.prepare.kernel import is_nvidia
from kda_ops.device.workspace import Batch, Workspace, at_least_one, stages
from kda_ops.formulas import CHUNK

# The number of segments: two gain nothing, each waits for a product per one before it, and with
# fewer chunks than this the passes' starts outweigh what they gain.
FEWEST, MOST, FEWEST_CHUNKS = 3, 8, 10
WIDEST = 128  # K: M is held whole in shared memory


@triton.jit
def segment_chunks(lo, hi, segment, SEGMENTS: tl.constexpr):
    """A segment's part of chunks lo to hi, and whether they end with it; the last ones may be
    empty.
    """
    size = tl.cdiv(hi - lo, SEGMENTS)
    first = tl.minimum(lo + segment * size, hi).to(tl.int32)
    last = tl.minimum(first + size, hi).to(tl.int32)
    return first, last, last == hi


@triton.jit
def segment_state(
    E_ptr, M_ptr, pair, segment, d, v, KP: tl.constexpr, V: tl.constexpr, SEGMENTS: tl.constexpr
):
    """The state [KP, v] that a segment begins with."""
    E_at = E_ptr + pair * (SEGMENTS * KP * V) + d[:, None] * V + v[None, :]
    M_at = M_ptr + pair * (SEGMENTS * KP * KP) + d[:, None] * KP + d[None, :]
    S = tl.load(E_at + tl.minimum(segment, 1) * (KP * V), mask=(v < V)[None, :], other=0.0)
    for i in tl.range(2, segment + 1, num_stages=2):
        M = tl.load(M_at + i * (KP * KP))
        E = tl.load(E_at + i * (KP * V), mask=(v < V)[None, :], other=0.0)
        Sh, S_scale = to_half(S)
        S = tl.dot(M, Sh) * S_scale + E
    return S


@triton.jit
def chunk_segments_kernel(
    w_ptr,
    u_ptr,
    kg_ptr,
    decay_ptr,
    S_ptr,
    E_ptr,
    M_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    indices_ptr,
    has_initial_ptr,
    cu_ptr,
    T,
    N,
    first_row,
    rows,
    slots,
    initial_n,
    initial_h,
    initial_v,
    initial_k,
    final_n,
    final_h,
    final_v,
    final_k,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    INITIAL: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HALF: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """E [N, HV, SEGMENTS, KP, V] in fp32 and M [N, HV, SEGMENTS, KP, KP] in fp16: of place 0 E is
    what the sequence begins with, of place i + 1 what segment i leaves, begun with that (i = 0) or
    with zero; of M the first two places are not used. With `|k| <= 1` and beta at most 2 no entry
    of M is above 1.

    Grid: (blocks of BV columns of E and M * HV * N * (SEGMENTS - 1)), blocks innermost.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    blocks: tl.constexpr = v_blocks + (KP + BV - 1) // BV
    p = tl.program_id(0).to(tl.int64)
    block = (p % blocks).to(tl.int32)
    pairs = tl.maximum(N * HV, 1)
    segment = p // blocks // pairs
    pair = p // blocks - segment * pairs
    n = pair // HV
    if n >= N:
        return
    of_M = block >= v_blocks
    if of_M & (segment == 0):
        return
    h = pair % HV
    v = block * BV + tl.arange(0, BV)
    b, start, end, row = sequence_rows(cu_ptr, n, T, N, VARLEN)
    lo = 0
    hi = tl.cdiv(end - start, 64).to(tl.int32)
    if SLABS:
        row, lo, hi, begins = slab_chunks(row, hi, first_row, rows)
        if hi < lo:
            return
    lo, hi, ends = segment_chunks(lo, hi, segment, SEGMENTS)
    if ends & (segment > 0):
        return
    page, live = page_of(indices_ptr, n, slots, PAGED)
    if live == 0:
        return
    r = tl.arange(0, 64)
    d = tl.arange(0, KP)
    in_v = (v < V)[None, :]
    m = v - v_blocks * BV
    E_at = E_ptr + pair * (SEGMENTS * KP * V) + d[:, None] * V + v[None, :]
    M_at = M_ptr + pair * (SEGMENTS * KP * KP) + d[:, None] * KP + m[None, :]
    if of_M:
        S = tl.where(d[:, None] == m[None, :], 1.0, 0.0)
    else:
        S = tl.zeros((KP, BV), tl.float32)
        if segment == 0:
            S = first_state(
                initial_ptr,
                final_ptr,
                has_initial_ptr,
                S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :] if SLABS else None,
                n,
                page,
                h,
                d,
                v,
                begins if SLABS else None,
                initial_n,
                initial_h,
                initial_v,
                initial_k,
                final_n,
                final_h,
                final_v,
                final_k,
                K,
                V,
                SLABS,
                INITIAL,
                PAGED,
                HAS_INITIAL,
            )
            tl.store(E_at, S, mask=in_v)

    rows_of = tl.full((), HV, tl.int64)
    work = row * HV + h
    tile = r[:, None] * KP + d[None, :]
    w_at = w_ptr + work * (64 * KP) + tile
    kg_at = kg_ptr + work * (64 * KP) + tile
    decay_at = decay_ptr + work * KP + d
    if u_ptr is None:
        u_at = o_ptr + ((b * T + start + r)[:, None] * HV + h) * V + v[None, :]
    else:
        u_at = u_ptr + work * (64 * V) + r[:, None] * V + v[None, :]
    length = (end - start).to(tl.int32)
    for c in tl.range(lo, hi, num_stages=STAGES):
        ok = (r < length - c * 64)[:, None] & in_v
        w = tl.load(w_at + c * rows_of * (64 * KP))
        u = tl.load(u_at + c * rows_of * (64 * V), mask=ok, other=0.0)
        kg = tl.load(kg_at + c * rows_of * (64 * KP))
        decay = tl.load(decay_at + c * rows_of * KP)
        if HALF:
            Sh, S_scale = to_half(S)
            vn, vn_scale = to_half(u.to(tl.float32) - tl.dot(w, Sh) * S_scale)
            S = S * decay[:, None] + tl.dot(tl.trans(kg), vn) * vn_scale
        else:
            vn = (u.to(tl.float32) - tl.dot(w, S.to(w.dtype))).to(w.dtype)
            S = tl.dot(tl.trans(kg), vn, S * decay[:, None])
    if of_M:
        tl.store(M_at + (segment + 1) * (KP * KP), S.to(tl.float16), mask=(m < KP)[None, :])
    else:
        tl.store(E_at + (segment + 1) * (KP * V), S, mask=in_v)


class Segments(NamedTuple):
    """E and M, see `chunk_segments_kernel`."""

    E: Tensor
    M: Tensor


def segment_count(K: int, V: int, batch: Batch, o: Tensor) -> int:
    """In how many segments `scan` works off each sequence: as many as fill the GPU with programs.

    As a launch is compiled for one number, a symbolic number of tokens counts as its hint, and of
    a symbolic number of sequences nothing is assumed.
    """
    pairs = batch.N * int(o.shape[2])
    if not (isinstance(pairs, int) and pairs and K <= WIDEST and is_nvidia(o.device)):
        return 1
    try:
        tokens = hint(o.shape[0] * batch.T)
    except NoHintError:
        return 1
    programs = pairs * triton.cdiv(V, 32)
    processors = torch.cuda.get_device_properties(o.device).multi_processor_count
    chunks = tokens // (CHUNK * batch.N)
    count = min(processors // programs, chunks // FEWEST_CHUNKS, MOST)
    return count if count >= FEWEST else 1


def launch_segments(
    o: Tensor,
    workspace: Workspace,
    batch: Batch,
    segments: int,
    states: tuple[Any, ...],
    strides: list[Any],
    sizes: dict[str, Any],
) -> Segments:
    """The first pass; the arguments after `segments` are those of `chunk_scan_kernel`."""
    HV, V, KP = sizes["HV"], sizes["V"], sizes["KP"]
    places = (at_least_one(batch.N), HV, segments, KP)
    found = Segments(
        torch.empty((*places, V), dtype=torch.float32, device=o.device),
        torch.empty((*places, KP), dtype=torch.float16, device=o.device),
    )
    chosen = choose("chunk_segments", o.device, K=sizes["K"], V=V, dtype=o.dtype)
    u = o if workspace.u is None else workspace.u
    depth = stages(2 * KP, KP, chosen["BV"], u.element_size(), o.device)
    blocks = triton.cdiv(V, chosen["BV"]) + triton.cdiv(KP, chosen["BV"])
    grid = blocks * HV * at_least_one(batch.N) * (segments - 1)
    traceable(chunk_segments_kernel)[(grid,)](
        workspace.w,
        workspace.u,
        workspace.kg,
        workspace.decay,
        workspace.S,
        *found,
        o,
        *states,
        *strides,
        **{name: size for name, size in sizes.items() if name != "FINAL"},
        HALF=o.dtype == torch.float16,
        SEGMENTS=segments,
        **{**chosen, "STAGES": min(chosen["STAGES"], depth)},
    )
    return found
