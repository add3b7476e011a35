"""The cumulative gate as one Triton kernel: x is read once, G is written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.device.kernel import chunk_span, gate_nats, padding_start
from kda_ops.formulas import RCP_LN2


@triton.jit
def gate_cumsum_kernel(
    x_ptr,
    A_log_ptr,
    dt_bias_ptr,
    cu_seqlens_ptr,
    chunks_ptr,
    G_ptr,
    T,
    rows,
    sequences,
    stride_batch,
    stride_token,
    stride_head,
    LOWER_BOUND: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOUNDED: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program computes BLOCK_K channels of one head of one chunk, SUB tokens at a time.

    Grid: (B * rows * HV * channel blocks), channel blocks innermost, then heads, so that neighbours
    read and write neighbouring memory; `rows` are chunks per batch entry, or rows of the chunk
    table. With a table, program row n also zeroes the n-th C tokens past the last sequence.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    k = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    h = (pid // blocks) % HV
    row = pid // (blocks * HV)
    batch = (row // rows).to(tl.int64)
    row = (row % rows).to(tl.int64)
    place = tl.arange(0, SUB)
    if VARLEN:
        start, end = chunk_span(cu_seqlens_ptr, chunks_ptr, row, sequences, T, C)
    else:
        start = row * C
        end = tl.minimum(start + C, T)
    x_ptr += batch * stride_batch + h.to(tl.int64) * stride_head
    G_ptr += batch * T * HV * K + h * K
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + h * K + k, mask=k < K, other=0.0).to(tl.float32)
    a = 1.0
    if HAS_A:
        a = tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
    before = tl.zeros([BLOCK_K], tl.float32)
    for first in tl.static_range(0, C, SUB):
        t = start + first + place
        ok = (t < end)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_token + k[None, :], mask=ok, other=0.0)
        # tokens past the end come last: their gate reaches no sum that is stored
        g = gate_nats(x.to(tl.float32) + bias[None, :], a, LOWER_BOUND, BOUNDED)
        G = (before[None, :] + tl.cumsum(g, axis=0)) * SCALE  # [SUB, BLOCK_K]
        tl.store(G_ptr + t[:, None] * (HV * K) + k[None, :], G, mask=ok)
        before += tl.sum(g, axis=0)
    if VARLEN:
        padding = padding_start(cu_seqlens_ptr, sequences, T) + row * C
        if padding < T:
            for first in tl.static_range(0, C, SUB):
                t = padding + first + place
                ok = (t < T)[:, None] & (k < K)[None, :]
                zeros = tl.zeros([SUB, BLOCK_K], tl.float32)
                tl.store(G_ptr + t[:, None] * (HV * K) + k[None, :], zeros, mask=ok)


def launch_gate_cumsum(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    chunks: Tensor | None,
) -> Tensor:
    B, T, HV, K = x.shape
    G = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return G
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if x.stride(3) != 1:
        x = x.contiguous()
    bias = None if dt_bias is None else dt_bias.contiguous()
    rows = triton.cdiv(T, chunk_size) if chunks is None else chunks.shape[0]
    block_k = max(16, min(128, triton.next_power_of_2(K)))
    traceable(gate_cumsum_kernel)[(B * rows * HV * triton.cdiv(K, block_k),)](
        x,
        A_log,
        bias,
        cu_seqlens,
        chunks,
        G,
        T,
        rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        LOWER_BOUND=0.0 if lower_bound is None else lower_bound,
        SCALE=RCP_LN2,
        C=chunk_size,
        SUB=min(chunk_size, 64),
        HV=HV,
        K=K,
        BLOCK_K=block_k,
        HAS_A=A_log is not None,
        HAS_BIAS=bias is not None,
        BOUNDED=lower_bound is not None,
        VARLEN=cu_seqlens is not None,
        num_warps=4,
    )
    return G
