"""The L2 norm as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.norm.kernel import four_axes, row_offset
from kda_ops.tuning import choose


@triton.jit
def l2norm_kernel(
    x_ptr, y_ptr, rows, size_1, size_2, stride_0, stride_1, stride_2,
    EPS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_ROWS rows of [K].

    Grid: (row blocks); rows count over three leading axes.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)
    ok = (row < rows)[:, None] & (k < K)[None, :]
    source = row_offset(row, size_1, size_2, stride_0, stride_1, stride_2)
    x = tl.load(x_ptr + source[:, None] + k[None, :], mask=ok, other=0.0).to(
        tl.float32
    )  # [BLOCK_ROWS, BLOCK_K]
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) + EPS)[:, None]
    tl.store(y_ptr + row[:, None] * K + k[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def launch_l2norm(x: Tensor, eps: float) -> Tensor:
    K = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    four = four_axes(x)
    rows = x.numel() // K
    block_k = triton.next_power_of_2(K)
    chosen = choose("l2norm", x.device, K=K, dtype=x.dtype)
    block_rows = max(1, chosen["TILE"] // block_k)
    traceable(l2norm_kernel)[(triton.cdiv(rows, block_rows),)](
        four, y, rows, four.shape[1], four.shape[2], four.stride(0), four.stride(1), four.stride(2),
        EPS=eps, K=K, BLOCK_K=block_k, BLOCK_ROWS=block_rows, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return y
