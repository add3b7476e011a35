"""The short convolution of q, k and v with the norms of q and k as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.choice import choose
from kda_ops.device.kernel import conv_blocks, conv_sequence, conv_state_strides


@triton.jit
def short_conv_qkv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    state_ptr,
    slots_ptr,
    has_initial_ptr,
    cu_seqlens_ptr,
    T,
    D,
    N,
    num_slots,
    block_t,
    blocks_per_sequence,
    stride_x_batch,
    stride_x_row,
    stride_state_slot,
    stride_state_row,
    stride_state_dim,
    stride_slots,
    EPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program computes block_t tokens of one sequence x BLOCK_D channels of q, of k or of v;
    see `conv_sequence`.

    Grid: token blocks x D blocks, D fastest, those of q, k and v in order. A block of q or k is
    BLOCK_D // BLOCK_K whole heads, each padded from K to BLOCK_K channels.
    """
    HEADS: tl.constexpr = BLOCK_D // BLOCK_K
    KEY_BLOCKS: tl.constexpr = (KEY_DIM // K + HEADS - 1) // HEADS
    d_blocks = 2 * KEY_BLOCKS + tl.cdiv(D - 2 * KEY_DIM, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    block = tl.program_id(0) % d_blocks
    part = tl.minimum(block // KEY_BLOCKS, 2)
    block -= part * KEY_BLOCKS
    width = tl.where(part == 2, D - 2 * KEY_DIM, KEY_DIM)
    y_ptr = tl.where(part == 0, q_ptr, tl.where(part == 1, k_ptr, v_ptr))
    i = tl.arange(0, BLOCK_D)
    c = block * BLOCK_D + i
    ok = c < width
    if BLOCK_K != K:
        head_c = (block * HEADS + i // BLOCK_K) * K + i % BLOCK_K
        ok = tl.where(part == 2, ok, (i % BLOCK_K < K) & (head_c < KEY_DIM))
        c = tl.where(part == 2, c, head_c)
    conv_sequence(
        x_ptr,
        weight_ptr,
        bias_ptr,
        y_ptr,
        state_ptr,
        slots_ptr,
        has_initial_ptr,
        cu_seqlens_ptr,
        pid,
        part * KEY_DIM + c,
        c,
        ok,
        part < 2,
        T,
        D,
        N,
        num_slots,
        block_t,
        blocks_per_sequence,
        stride_x_batch,
        stride_x_row,
        width,
        stride_state_slot,
        stride_state_row,
        stride_state_dim,
        stride_slots,
        W,
        BLOCK_W,
        STEP_T,
        BLOCK_D,
        SILU,
        HAS_BIAS,
        HAS_STATE,
        HAS_INITIAL,
        VARLEN,
        EPS,
        HEADS,
        PADDED=BLOCK_K != K,
    )


def launch_short_conv_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        x, weight, bias, activation, key_dim, head_dim, norm_eps, None, None, None, cu_seqlens, "SD"
    )


def launch_short_conv_qkv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, conv_state: Tensor, slots: Tensor,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        x, weight, bias, activation, key_dim, head_dim, norm_eps, conv_state, slots,
        has_initial_state, cu_seqlens, layout,
    )  # fmt: skip


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, conv_state: Tensor | None, slots: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T = x.shape[:2]
    # static: with a symbolic D - 2 * key_dim Inductor does not see that v is dense, and copies it
    D, W, H = int(weight.shape[0]), int(weight.shape[1]), key_dim // head_dim
    q, k = (torch.empty((B, T, H, head_dim), dtype=x.dtype, device=x.device) for _ in range(2))
    v = torch.empty((B, T, D - 2 * key_dim), dtype=x.dtype, device=x.device)
    if x.stride(2) != 1:
        x = x.contiguous()
    block_k = triton.next_power_of_2(head_dim)
    chosen = choose("short_conv_qkv", x.device, D=D, W=W, K=head_dim, dtype=x.dtype)
    block_d = max(chosen["BLOCK_D"], block_k)
    key_blocks = triton.cdiv(H, block_d // block_k)
    d_blocks = 2 * key_blocks + triton.cdiv(D - 2 * key_dim, block_d)
    block_t, blocks_per_sequence, N, blocks = conv_blocks(
        B, T, cu_seqlens, d_blocks, chosen["STEP_T"], chosen["MAX_STEPS"], chosen["PROGRAMS"]
    )
    stride_slot, stride_row, stride_dim = conv_state_strides(conv_state, layout)
    traceable(short_conv_qkv_kernel)[(d_blocks * blocks,)](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        q,
        k,
        v,
        conv_state,
        slots,
        None if has_initial_state is None else has_initial_state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        T,
        D,
        N,
        0 if conv_state is None else conv_state.shape[0],
        block_t,
        blocks_per_sequence,
        x.stride(0),
        x.stride(1),
        stride_slot,
        stride_row,
        stride_dim,
        0 if slots is None else slots.stride(0),
        EPS=norm_eps,
        KEY_DIM=key_dim,
        K=head_dim,
        BLOCK_K=block_k,
        W=W,
        BLOCK_W=triton.next_power_of_2(W),
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_STATE=conv_state is not None,
        HAS_INITIAL=has_initial_state is not None,
        VARLEN=cu_seqlens is not None,
        STEP_T=chosen["STEP_T"],
        BLOCK_D=block_d,
        num_warps=chosen["num_warps"],
    )
    return q, k, v
