"""The KDA gate as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.gating.kernel import gate_constants, gate_nats, gate_rate
from kda_ops.tuning import choose


@triton.jit
def gate_kernel(
    x_ptr, A_log_ptr, dt_bias_ptr, g_ptr,
    rows, stride_row, stride_head,
    LOWER_BOUND: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_ROWS rows x [K] of one head.

    Grid: (row blocks * HV), heads innermost, so that neighbors access adjacent memory.
    """
    pid = tl.program_id(0).to(tl.int64)
    h = pid % HV
    r = (pid // HV) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)
    ok = (r < rows)[:, None] & (k < K)[None, :]
    z = tl.load(
        x_ptr + r[:, None] * stride_row + h * stride_head + k[None, :], mask=ok, other=0.0
    ).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(dt_bias_ptr + h * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    a = gate_rate(A_log_ptr, h, HAS_A)
    g = gate_nats(z, a, LOWER_BOUND, BOUNDED)  # [BLOCK_ROWS, BLOCK_K]
    tl.store(g_ptr + (r[:, None] * HV + h) * K + k[None, :], g, mask=ok)


def launch_gate(
    raw_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    HV, K = raw_gate.shape[-2:]
    g = torch.empty(raw_gate.shape, dtype=torch.float32, device=raw_gate.device)
    if raw_gate.numel() == 0:
        return g
    rows = raw_gate.numel() // (HV * K)
    flat = raw_gate.reshape(rows, HV, K)
    if flat.stride(2) != 1:
        flat = flat.contiguous()
    block_k = triton.next_power_of_2(K)
    chosen = choose("gate", raw_gate.device, K=K, dtype=raw_gate.dtype)
    block_rows = max(1, chosen["TILE"] // block_k)
    traceable(gate_kernel)[(triton.cdiv(rows, block_rows) * HV,)](
        flat, contiguous(A_log), contiguous(dt_bias), g, rows, flat.stride(0), flat.stride(1),
        HV=HV, K=K, BLOCK_K=block_k, BLOCK_ROWS=block_rows,
        **gate_constants(A_log, dt_bias, lower_bound), num_warps=chosen["num_warps"],
    )  # fmt: skip
    return g
