"""The cumulative gate as one Triton kernel: raw_gate is read once, g_cumsum is written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops._numerics import RCP_LN2
from kda_ops.gating.kernel import chunk_span, padding_start, rate, softplus
from kda_ops.tuning import choose


@triton.jit
def gate_cumsum_kernel(
    x_ptr, A_log_ptr, dt_bias_ptr, cu_seqlens_ptr, chunk_indices_ptr, G_ptr,
    T, rows, sequences,
    stride_batch, stride_token, stride_head,
    LOWER_BOUND: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, HAS_A: tl.constexpr,
    HAS_BIAS: tl.constexpr, BOUNDED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK of the HV * K channels of one chunk.

    It walks down the tokens with the running sums in registers, so nothing is exchanged between
    threads. STEP tokens are read at once, summed by themselves and put on top of the sum so far: as
    many loads are in flight, and the rounding error is that of STEP + C / STEP terms, not of C.
    Sums that overflow are the least finite number: of infinite ones there is no difference.

    Grid: (B * rows * channel blocks), channel blocks innermost; `rows` are chunks per batch entry,
    or rows of the chunk table. With a table, program row n also zeroes the n-th C tokens past the
    last sequence.
    """
    D: tl.constexpr = HV * K
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
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
    h = d // K
    source = x_ptr + batch * stride_batch + h.to(tl.int64) * stride_head + d % K
    G_ptr += batch * T * D + d
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    a = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_A:
        a = rate(tl.load(A_log_ptr + h, mask=d < D, other=0.0))
    factor = tl.full([BLOCK], LOWER_BOUND * SCALE, tl.float32) if BOUNDED else a * -SCALE
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
            z = tokens[i].to(tl.float32) + bias
            if BOUNDED:
                sums += tl.sigmoid(a * z)
            else:
                sums += softplus(z)
            g_cumsum = sums * factor + before
            if not BOUNDED:
                g_cumsum = tl.maximum(
                    g_cumsum, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL
                )
            tl.store(G_ptr + t * D, g_cumsum, mask=(d < D) & (t < end))
        before += sums * factor
    if VARLEN:
        padding = padding_start(cu_seqlens_ptr, sequences, T) + row * C
        for t in range(padding, tl.minimum(padding + C, T)):
            tl.store(G_ptr + t * D, tl.zeros([BLOCK], tl.float32), mask=d < D)


def launch_gate_cumsum(
    raw_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    chunk_size: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> Tensor:  # fmt: skip
    B, T, HV, K = raw_gate.shape
    g_cumsum = torch.empty(raw_gate.shape, dtype=torch.float32, device=raw_gate.device)
    if raw_gate.numel() == 0:
        return g_cumsum
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        return torch.zeros(raw_gate.shape, dtype=torch.float32, device=raw_gate.device)
    if raw_gate.stride(3) != 1:
        raw_gate = raw_gate.contiguous()
    bias = None if dt_bias is None else dt_bias.contiguous()
    rows = triton.cdiv(T, chunk_size) if chunk_indices is None else chunk_indices.shape[0]
    chosen = choose("gate_cumsum", raw_gate.device, D=HV * K, C=chunk_size, dtype=raw_gate.dtype)
    block = min(chosen["BLOCK"], triton.next_power_of_2(HV * K))
    traceable(gate_cumsum_kernel)[(B * rows * triton.cdiv(HV * K, block),)](
        raw_gate, None if A_log is None else A_log.contiguous(), bias,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if chunk_indices is None else chunk_indices.contiguous(), g_cumsum, T, rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, raw_gate.stride(0),
        raw_gate.stride(1), raw_gate.stride(2),
        LOWER_BOUND=0.0 if lower_bound is None else lower_bound, SCALE=RCP_LN2, C=chunk_size, HV=HV,
        K=K, BLOCK=block, STEP=min(chunk_size, chosen["STEP"]), HAS_A=A_log is not None,
        HAS_BIAS=bias is not None, BOUNDED=lower_bound is not None, VARLEN=cu_seqlens is not None,
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return g_cumsum
