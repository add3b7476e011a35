"""The chunk-local cumulative sum as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.gating.kernel import chunk_block, clear_block, running_sums
from kda_ops.tuning import choose


@triton.jit
def chunk_cumsum_kernel(
    g_ptr, cu_seqlens_ptr, chunk_indices_ptr, out_ptr,
    T, D, rows, sequences,
    stride_batch, stride_token,
    SCALE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK channels of one chunk; see `chunk_block` and `running_sums`."""
    d, batch, row, start, end = chunk_block(
        cu_seqlens_ptr, chunk_indices_ptr, T, D, rows, sequences, C, BLOCK, VARLEN
    )
    g_ptr = g_ptr + batch * stride_batch + d
    out_ptr += batch * T * D + d
    running_sums(
        g_ptr, out_ptr, d, start, end, stride_token, D, SCALE, None, None, C, BLOCK, STEP, False,
        False,
    )  # fmt: skip
    if VARLEN:
        clear_block(out_ptr, cu_seqlens_ptr, d, row, sequences, T, D, C, BLOCK)


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
        flat, contiguous(cu_seqlens), contiguous(chunk_indices), out, T, D, rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, flat.stride(0), flat.stride(1),
        SCALE=scale, C=chunk_size, BLOCK=block, STEP=min(chunk_size, chosen["STEP"]),
        VARLEN=cu_seqlens is not None, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out
