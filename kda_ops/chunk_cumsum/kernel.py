"""The chunk-local cumulative sum as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.device.kernel import chunk_span, padding_start


@triton.jit
def chunk_cumsum_kernel(
    g_ptr,
    cu_seqlens_ptr,
    chunks_ptr,
    out_ptr,
    T,
    D,
    rows,
    sequences,
    stride_batch,
    stride_token,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program sums BLOCK_D channels of one chunk, SUB tokens at a time.

    Grid: (B * rows * channel blocks), channel blocks innermost; `rows` are chunks per batch entry,
    or rows of the chunk table. With a table, program row n also zeroes the n-th C tokens past the
    last sequence.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = pid // blocks
    batch = (row // rows).to(tl.int64)
    row = (row % rows).to(tl.int64)
    place = tl.arange(0, SUB)
    if VARLEN:
        start, end = chunk_span(cu_seqlens_ptr, chunks_ptr, row, sequences, T, C)
    else:
        start = row * C
        end = tl.minimum(start + C, T)
    out_ptr += batch * T * D
    before = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, C, SUB):
        t = start + first + place
        ok = (t < end)[:, None] & (d < D)[None, :]
        source = g_ptr + batch * stride_batch + t[:, None] * stride_token + d[None, :]
        g = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        sums = (before[None, :] + tl.cumsum(g, axis=0)) * SCALE  # [SUB, BLOCK_D]
        tl.store(out_ptr + t[:, None] * D + d[None, :], sums, mask=ok)
        before += tl.sum(g, axis=0)
    if VARLEN:
        padding = padding_start(cu_seqlens_ptr, sequences, T) + row * C
        if padding < T:
            for first in tl.static_range(0, C, SUB):
                t = padding + first + place
                ok = (t < T)[:, None] & (d < D)[None, :]
                zeros = tl.zeros([SUB, BLOCK_D], tl.float32)
                tl.store(out_ptr + t[:, None] * D + d[None, :], zeros, mask=ok)


def launch_chunk_cumsum(
    g: Tensor, chunk_size: int, scale: float, cu_seqlens: Tensor | None, chunks: Tensor | None
) -> Tensor:
    B, T = g.shape[:2]
    out = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    if g.numel() == 0:
        return out
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        return torch.zeros(g.shape, dtype=torch.float32, device=g.device)
    D = g.numel() // (B * T)
    flat = g.reshape(B, T, D)
    if flat.stride(2) != 1:
        flat = flat.contiguous()
    rows = triton.cdiv(T, chunk_size) if chunks is None else chunks.shape[0]
    block_d = max(16, min(128, triton.next_power_of_2(D)))
    traceable(chunk_cumsum_kernel)[(B * rows * triton.cdiv(D, block_d),)](
        flat,
        cu_seqlens,
        chunks,
        out,
        T,
        D,
        rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        flat.stride(0),
        flat.stride(1),
        SCALE=scale,
        C=chunk_size,
        SUB=min(chunk_size, 64),
        BLOCK_D=block_d,
        VARLEN=cu_seqlens is not None,
        num_warps=4,
    )
    return out
