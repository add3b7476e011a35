"""The chunk-local cumulative sum as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.gating.kernel import chunk_span, padding_start
from kda_ops.tuning import choose


@triton.jit
def chunk_cumsum_kernel(
    g_ptr, cu_seqlens_ptr, chunk_indices_ptr, out_ptr,
    T, D, rows, sequences,
    stride_batch, stride_token,
    SCALE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK channels of one chunk.

    It walks down the tokens with the running sums in registers, so nothing is exchanged between
    threads. STEP tokens are read at once, summed by themselves and put on top of the sum so far: as
    many loads are in flight, and the rounding error is that of STEP + C / STEP terms, not of C.

    Grid: (B * rows * channel blocks), channel blocks innermost; `rows` are chunks per batch entry,
    or rows of the chunk table. With a table, program row n also zeroes the n-th C tokens past the
    last sequence.
    """
    blocks = tl.cdiv(D, BLOCK)
    pid = tl.program_id(0)
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = pid // blocks
    batch = (row // rows).to(tl.int64)
    row = (row % rows).to(tl.int64)
    if VARLEN:
        start, end = chunk_span(cu_seqlens_ptr, chunk_indices_ptr, row, sequences, T, C)
    else:
        start = row * C
        end = tl.minimum(start + C, T)
    source = g_ptr + batch * stride_batch + d
    out_ptr += batch * T * D + d
    before = tl.zeros([BLOCK], tl.float32)
    for first in range(0, C, STEP):
        tokens = ()
        for i in tl.static_range(STEP):
            t = start + first + i
            ok = (d < D) & (t < end)
            tokens = tokens + (tl.load(source + t * stride_token, mask=ok, other=0.0),)  # noqa: RUF005
        sums = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(STEP):
            t = start + first + i
            sums += tokens[i].to(tl.float32)
            tl.store(out_ptr + t * D, (before + sums) * SCALE, mask=(d < D) & (t < end))
        before += sums
    if VARLEN:
        padding = padding_start(cu_seqlens_ptr, sequences, T) + row * C
        for t in range(padding, tl.minimum(padding + C, T)):
            tl.store(out_ptr + t * D, tl.zeros([BLOCK], tl.float32), mask=d < D)


def launch_chunk_cumsum(
    g: Tensor, chunk_size: int, scale: float, cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
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
    rows = triton.cdiv(T, chunk_size) if chunk_indices is None else chunk_indices.shape[0]
    chosen = choose("chunk_cumsum", g.device, D=D, C=chunk_size, dtype=g.dtype)
    block = min(chosen["BLOCK"], triton.next_power_of_2(D))
    traceable(chunk_cumsum_kernel)[(B * rows * triton.cdiv(D, block),)](
        flat, None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if chunk_indices is None else chunk_indices.contiguous(), out, T, D, rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, flat.stride(0), flat.stride(1),
        SCALE=scale, C=chunk_size, BLOCK=block, STEP=min(chunk_size, chosen["STEP"]),
        VARLEN=cu_seqlens is not None, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out
