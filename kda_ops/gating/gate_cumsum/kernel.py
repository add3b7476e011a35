"""The cumulative gate as one Triton kernel that reads raw_gate and writes g_cumsum once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops._numerics import RCP_LN2
from kda_ops.gating.kernel import chunk_block, clear_block, gate_constants, rate, running_sums
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
    """One program computes BLOCK of the HV * K channels of one chunk; see `chunk_block` and
    `running_sums`.
    """
    D: tl.constexpr = HV * K
    d, batch, row, start, end = chunk_block(
        cu_seqlens_ptr, chunk_indices_ptr, T, D, rows, sequences, C, BLOCK, VARLEN
    )
    h = d // K
    x_ptr = x_ptr + batch * stride_batch + h.to(tl.int64) * stride_head + d % K
    G_ptr += batch * T * D + d
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    a = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_A:
        a = rate(tl.load(A_log_ptr + h, mask=d < D, other=0.0))
    factor = tl.full([BLOCK], LOWER_BOUND * SCALE, tl.float32) if BOUNDED else a * -SCALE
    running_sums(
        x_ptr, G_ptr, d, start, end, stride_token, D, factor, a, bias, C, BLOCK, STEP, True, BOUNDED
    )
    if VARLEN:
        clear_block(G_ptr, cu_seqlens_ptr, d, row, sequences, T, D, C, BLOCK)


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
    rows = triton.cdiv(T, chunk_size) if chunk_indices is None else chunk_indices.shape[0]
    chosen = choose("gate_cumsum", raw_gate.device, D=HV * K, C=chunk_size, dtype=raw_gate.dtype)
    block = min(chosen["BLOCK"], triton.next_power_of_2(HV * K))
    traceable(gate_cumsum_kernel)[(B * rows * triton.cdiv(HV * K, block),)](
        raw_gate, contiguous(A_log), contiguous(dt_bias), contiguous(cu_seqlens),
        contiguous(chunk_indices), g_cumsum, T, rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, raw_gate.stride(0),
        raw_gate.stride(1), raw_gate.stride(2),
        SCALE=RCP_LN2, C=chunk_size, HV=HV, K=K, BLOCK=block, STEP=min(chunk_size, chosen["STEP"]),
        VARLEN=cu_seqlens is not None, **gate_constants(A_log, dt_bias, lower_bound),
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return g_cumsum
