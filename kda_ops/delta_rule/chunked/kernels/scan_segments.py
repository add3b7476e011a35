"""`scan` for few heads: segments of a sequence's chunks in parallel.

A chunk maps S to T S + U, with T = diag(decay) - kg^T w and U = kg^T u, so a segment maps S to
M S + E, with M the product of its T and E its image of zero. A first pass scans the first segment
and computes M and E of those between it and the last, columns of both in the same way: those of M
are states of a sequence without u that starts from the identity. Then every other segment computes
its initial state from the M and E before it, and `scan` runs in all of them in parallel. M and E
take two of `scan`'s four GEMMs per chunk, for the columns of a state and K more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import is_nvidia, traceable
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.kernels.tiles import (
    boundaries_of,
    clear_sequence,
    first_state,
    page_of,
    scan_chunks,
    sequence_part,
    store_state,
    to_half,
)
from kda_ops.delta_rule.chunked.workspace import Batch, Workspace, at_least_one, stages
from kda_ops.tuning import choose
from kda_ops.tuning.example_inputs import NoHintError, hint

# Segments of `scan`: columns of the state per program, least number of segments, least chunks in
# each. Fewer gain nothing: each waits for one GEMM per segment before it, and wide blocks need two
# waves in the first pass.
FORMS = ((32, 4, 8), (64, 5, 20))
MOST = 16  # segments
WIDEST = 128  # K: the whole M is in shared memory


@triton.jit
def segment_chunks(lo, hi, segment, SEGMENTS: tl.constexpr):
    """A segment's part of chunks lo to hi, and whether it is the last part; the last segments may
    be empty.
    """
    size = tl.cdiv(hi - lo, SEGMENTS)
    first = tl.minimum(lo + segment * size, hi).to(tl.int32)
    last = tl.minimum(first + size, hi).to(tl.int32)
    return first, last, last == hi


@triton.jit
def segment_state(
    E_ptr, M_ptr, pair, segment, d, v,
    KP: tl.constexpr, V: tl.constexpr, SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The initial state [KP, v] of a segment other than the first."""
    E_at = E_ptr + pair * ((SEGMENTS - 1) * KP * V) + d[:, None] * V + v[None, :]
    M_at = M_ptr + pair * ((SEGMENTS - 1) * KP * KP) + d[:, None] * KP + d[None, :]
    S = tl.load(E_at, mask=(v < V)[None, :], other=0.0)
    for i in tl.range(1, segment, num_stages=STAGES):
        M = tl.load(M_at + i * (KP * KP))
        E = tl.load(E_at + i * (KP * V), mask=(v < V)[None, :], other=0.0)
        Sh, S_scale = to_half(S)
        S = tl.dot(M, Sh) * S_scale + E
    return S


@triton.jit
def chunk_segments_kernel(
    tiles_ptr, u_ptr, decay_ptr, S_ptr, E_ptr, M_ptr, o_ptr, initial_ptr, final_ptr, indices_ptr,
    has_initial_ptr, cu_ptr, blocks_ptr, contexts_ptr,
    T, N, first_row, rows, slots, columns,
    initial_n, initial_h, initial_v, initial_k, final_n, final_h, final_v, final_k,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    BE: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, PAGED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HALF: tl.constexpr, SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scans the first segment of every sequence, and computes for those between it and the last
    E [N, HV, SEGMENTS - 1, KP, V] in fp32 and M [N, HV, SEGMENTS - 1, KP, KP] in fp16. For the
    first one E is its final state, and M is unused. With `|k| <= 1` and beta at most 2 no entry of
    M is above 1.

    Grid: (blocks of BV columns of a state * HV * N, then blocks of BE columns of E and M * HV * N *
    (SEGMENTS - 2)), blocks innermost.
    """
    scanned: tl.constexpr = (V + BV - 1) // BV
    v_blocks: tl.constexpr = (V + BE - 1) // BE
    blocks: tl.constexpr = v_blocks + (KP + BE - 1) // BE
    pairs = tl.maximum(N * HV, 1)
    p = tl.program_id(0).to(tl.int64)
    in_first = p < scanned * pairs
    if in_first:
        segment = p * 0
        pair = p // scanned
        block = (p % scanned).to(tl.int32)
    else:
        p -= scanned * pairs
        segment = p // blocks // pairs + 1
        pair = p // blocks % pairs
        block = (p % blocks).to(tl.int32)
    n = pair // HV
    if n >= N:
        return
    h = pair % HV
    b, start, end, row, lo, hi, begins, _ = sequence_part(
        n, cu_ptr, T, N, first_row, rows, VARLEN, SLABS
    )
    if SLABS and hi < lo:
        return
    lo, hi, ends = segment_chunks(lo, hi, segment, SEGMENTS)
    page, live = page_of(indices_ptr, n, slots, PAGED)
    d = tl.arange(0, KP)
    memory = (tiles_ptr, u_ptr, decay_ptr, o_ptr)
    place = (h, b * T + start, (end - start).to(tl.int32), row)
    initial = (initial_n, initial_h, initial_v, initial_k)
    final = (final_n, final_h, final_v, final_k)
    states = (initial_ptr, initial, final_ptr, final, has_initial_ptr)
    E_at = E_ptr + (pair * (SEGMENTS - 1) + segment) * (KP * V) + d[:, None] * V
    if in_first:
        v = block * BV + tl.arange(0, BV)
        if live == 0:
            clear_sequence(o_ptr, b, start, end, h, T, v, HV, V)
            return
        if SLABS:
            carried = S_ptr + (n * HV + h) * (KP * V) + d[:, None] * V + v[None, :]
        S = first_state(
            states, carried if SLABS else None, n, page, h, d, v, begins, K, V,
            SLABS, INITIAL, PAGED, HAS_INITIAL,
        )  # fmt: skip
        boundaries = None
        if BLOCK_TOKENS > 0:
            boundaries = boundaries_of(
                blocks_ptr, contexts_ptr, columns, final_ptr, final, slots, n
            )
        S = scan_chunks(
            memory, S, place, lo, hi, v, boundaries, HV, K, V, KP, HALF, BLOCK_TOKENS, STAGES, True
        )
        store_state(
            final_ptr, final, carried if SLABS else None, S, ends, page, h, d, v, K, V, FINAL, SLABS
        )
        tl.store(E_at + v[None, :], S, mask=(v < V)[None, :])
        return
    if ends | (live == 0):
        return
    v = block * BE + tl.arange(0, BE)
    m = v - v_blocks * BE
    if block >= v_blocks:
        S = tl.where(d[:, None] == m[None, :], 1.0, 0.0)
        v = V + m  # past the columns of u
    else:
        S = tl.zeros((KP, BE), tl.float32)
    S = scan_chunks(memory, S, place, lo, hi, v, None, HV, K, V, KP, HALF, 0, STAGES, False)
    if block >= v_blocks:
        M_at = M_ptr + (pair * (SEGMENTS - 1) + segment) * (KP * KP) + d[:, None] * KP
        tl.store(M_at + m[None, :], S.to(tl.float16), mask=(m < KP)[None, :])
    else:
        tl.store(E_at + v[None, :], S, mask=(v < V)[None, :])


class Segments(NamedTuple):
    """E and M, see `chunk_segments_kernel`."""

    E: Tensor
    M: Tensor


def has_segments(dtype: torch.dtype, K: Any) -> bool:
    """Whether the kernels here support such inputs, of any length."""
    return bool(dtype != torch.float32 and K <= WIDEST)


def segment_count(K: int, V: int, batch: Batch, o: Tensor) -> int:
    """The number of segments in which `scan` processes each sequence: as many as fill the GPU."""
    # the first pass scans one more segment than the second
    return count_segments(K, V, batch, o, FORMS, 1)


def count_segments(
    K: int, V: int, batch: Batch, o: Tensor, forms: Sequence[tuple[int, int, int]], more: int
) -> int:
    """As many segments as fill the GPU and `more`, in the first of the forms (columns of the state
    per program, least number of segments, least chunks in each) that allows so many; else 1.

    A launch is compiled for one number, so a symbolic number of tokens counts as its hint, and a
    symbolic number of sequences rules segments out.
    """
    pairs = batch.N * int(o.shape[2])
    if not (isinstance(pairs, int) and pairs and has_segments(o.dtype, K) and is_nvidia(o.device)):
        return 1
    try:
        chunks = hint(o.shape[0] * batch.T) // (CHUNK * batch.N)
    except NoHintError:
        return 1
    processors = torch.cuda.get_device_properties(o.device).multi_processor_count
    for columns, fewest, fewest_chunks in forms:
        count = processors // (pairs * triton.cdiv(V, columns)) + more
        count = min(count, chunks // fewest_chunks, MOST)
        if count >= fewest:
            return count
    return 1


def launch_segments(
    workspace: Workspace, batch: Batch, scan: dict[str, Any], arguments: tuple[Any, ...],
    sizes: dict[str, Any],
) -> Segments:  # fmt: skip
    """The first pass; `scan` are the tuned values of the second, the rest is shared by both."""
    o, HV, V, KP = arguments[0], sizes["HV"], sizes["V"], sizes["KP"]
    pairs = HV * at_least_one(batch.N)
    places = (at_least_one(batch.N), HV, sizes["SEGMENTS"] - 1, KP)
    found = Segments(
        torch.empty((*places, V), dtype=torch.float32, device=o.device),
        torch.empty((*places, KP), dtype=torch.float16, device=o.device),
    )
    chosen = choose("chunk_segments", o.device, K=sizes["K"], V=V, dtype=o.dtype)
    u = o if workspace.u is None else workspace.u
    depth = stages(2 * KP, KP, chosen["BE"], u.element_size(), o.device)
    blocks = triton.cdiv(V, chosen["BE"]) + triton.cdiv(KP, chosen["BE"])
    grid = (triton.cdiv(V, scan["BV"]) + blocks * (sizes["SEGMENTS"] - 2)) * pairs
    traceable(chunk_segments_kernel)[(grid,)](
        *workspace, *found, *arguments, **sizes, BV=scan["BV"],
        **{**chosen, "STAGES": min(chosen["STAGES"], scan["STAGES"], depth)},
    )  # fmt: skip
    return found
