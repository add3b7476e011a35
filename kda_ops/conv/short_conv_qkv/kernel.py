"""The short convolution of q, k and v with the norms of q and k as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.blocks import Blocks, block_arguments
from kda_ops.conv.kernel import conv_blocks, conv_sequence, conv_state_strides, of_part, three
from kda_ops.tuning import choose

NONE = (None, None, None)


@triton.jit
def short_conv_qkv_kernel(
    x_ptr, x_k_ptr, x_v_ptr, weight_ptr, weight_k_ptr, weight_v_ptr, bias_ptr, bias_k_ptr,
    bias_v_ptr, q_ptr, k_ptr, v_ptr, state_ptr, state_k_ptr, state_v_ptr, slots_ptr,
    has_initial_ptr, cu_seqlens_ptr, blocks_ptr, contexts_ptr,
    T, value_dim, N, num_slots, columns,
    block_t, blocks_per_sequence,
    stride_x_batch, stride_x_batch_k, stride_x_batch_v, stride_x_row, stride_x_row_k,
    stride_x_row_v, stride_state_slot, stride_state_slot_k, stride_state_slot_v, stride_state_row,
    stride_state_row_k, stride_state_row_v, stride_state_dim, stride_slots,
    EPS: tl.constexpr, KEY_DIM: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    W: tl.constexpr, BLOCK_W: tl.constexpr, STEP_T: tl.constexpr, BLOCK_D: tl.constexpr,
    UNPACKED: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, VARLEN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program computes block_t tokens of one sequence x BLOCK_D channels of q, of k or of v;
    see `conv_sequence`.

    Grid: token blocks x D blocks, D fastest, those of q, k and v in order. A block of q or k is
    BLOCK_D // BLOCK_K whole heads, each padded from K to BLOCK_K channels.

    With UNPACKED each of q, k and v has its own input, weight, bias and state; otherwise the first
    pointers are to tensors of all channels, q | k | v, and those of k and v are None.
    """
    HEADS: tl.constexpr = BLOCK_D // BLOCK_K
    KEY_BLOCKS: tl.constexpr = (KEY_DIM // K + HEADS - 1) // HEADS
    d_blocks = 2 * KEY_BLOCKS + tl.cdiv(value_dim, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    block = tl.program_id(0) % d_blocks
    part = tl.minimum(block // KEY_BLOCKS, 2)
    block -= part * KEY_BLOCKS
    width = tl.where(part == 2, value_dim, KEY_DIM)
    y_ptr = of_part(part, q_ptr, k_ptr, v_ptr)
    i = tl.arange(0, BLOCK_D)
    c = block * BLOCK_D + i
    ok = c < width
    if BLOCK_K != K:
        head_c = (block * HEADS + i // BLOCK_K) * K + i % BLOCK_K
        ok = tl.where(part == 2, ok, (i % BLOCK_K < K) & (head_c < KEY_DIM))
        c = tl.where(part == 2, c, head_c)
    if UNPACKED:
        x_ptr = of_part(part, x_ptr, x_k_ptr, x_v_ptr)
        stride_x_batch = of_part(part, stride_x_batch, stride_x_batch_k, stride_x_batch_v)
        stride_x_row = of_part(part, stride_x_row, stride_x_row_k, stride_x_row_v)
        weight_ptr = of_part(part, weight_ptr, weight_k_ptr, weight_v_ptr)
        if HAS_BIAS:
            bias_ptr = of_part(part, bias_ptr, bias_k_ptr, bias_v_ptr)
        if HAS_STATE:
            state_ptr = of_part(part, state_ptr, state_k_ptr, state_v_ptr)
            stride_state_slot = of_part(
                part, stride_state_slot, stride_state_slot_k, stride_state_slot_v
            )
            stride_state_row = of_part(
                part, stride_state_row, stride_state_row_k, stride_state_row_v
            )
    else:
        first = part * KEY_DIM
        x_ptr += first
        weight_ptr += first * W
        if HAS_BIAS:
            bias_ptr += first
        if HAS_STATE:
            state_ptr += first.to(tl.int64) * stride_state_dim
    blocks = (blocks_ptr, columns, contexts_ptr)
    conv_sequence(
        x_ptr, weight_ptr, bias_ptr, y_ptr, state_ptr, slots_ptr, has_initial_ptr, cu_seqlens_ptr,
        blocks, pid, c, ok, part < 2, T, N, num_slots, block_t, blocks_per_sequence, stride_x_batch,
        stride_x_row, width, stride_state_slot, stride_state_row, stride_state_dim, stride_slots, W,
        BLOCK_W, STEP_T, BLOCK_D, SILU, HAS_BIAS, HAS_STATE, HAS_INITIAL, VARLEN, BLOCK_TOKENS, EPS,
        HEADS, PADDED=BLOCK_K != K,
    )  # fmt: skip


def launch_short_conv_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        (x,), (weight,), (bias,), activation, key_dim, head_dim, norm_eps, (None,), None, None,
        cu_seqlens, "SD", None,
    )  # fmt: skip


def launch_short_conv_qkv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, conv_state: Tensor, state_indices: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        (x,), (weight,), (bias,), activation, key_dim, head_dim, norm_eps, (conv_state,),
        state_indices, has_initial_state, cu_seqlens, layout,
        Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip


def launch_short_conv_qkv_unpacked(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        (q, k, v), (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), activation,
        int(q_weight.shape[0]), head_dim, norm_eps, NONE, None, None, cu_seqlens, "SD", None,
    )  # fmt: skip


def launch_short_conv_qkv_unpacked_state(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, q_state: Tensor, k_state: Tensor, v_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch(
        (q, k, v), (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), activation,
        int(q_weight.shape[0]), head_dim, norm_eps, (q_state, k_state, v_state), state_indices,
        has_initial_state, cu_seqlens, layout,
        Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip


def _launch(
    xs: tuple[Tensor, ...], weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...],
    activation: str | None, key_dim: int, head_dim: int, norm_eps: float,
    states: tuple[Tensor | None, ...], state_indices: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
    blocks: Blocks | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Takes one packed tensor of each, or three, for q, k and v."""
    xs = tuple(x if x.stride(2) == 1 else x.contiguous() for x in xs)
    weights = tuple(weight.contiguous() for weight in weights)
    biases = tuple(contiguous(bias) for bias in biases)
    x = xs[0]
    B, T = x.shape[:2]
    # static: with a symbolic value_dim Inductor cannot prove that v is dense, and copies it
    W, H = int(weights[0].shape[1]), key_dim // head_dim
    value_dim = int(weights[-1].shape[0]) - (2 * key_dim if len(xs) == 1 else 0)
    q, k = (torch.empty((B, T, H, head_dim), dtype=x.dtype, device=x.device) for _ in range(2))
    v = torch.empty((B, T, value_dim), dtype=x.dtype, device=x.device)
    block_k = triton.next_power_of_2(head_dim)
    D = 2 * key_dim + value_dim
    chosen = choose("short_conv_qkv", x.device, D=D, W=W, K=head_dim, dtype=x.dtype)
    block_d = max(chosen["BLOCK_D"], block_k)
    key_blocks = triton.cdiv(H, block_d // block_k)
    d_blocks = 2 * key_blocks + triton.cdiv(value_dim, block_d)
    block_t, blocks_per_sequence, N, token_blocks = conv_blocks(
        B, T, cu_seqlens, d_blocks, chosen["STEP_T"], chosen["MAX_STEPS"], chosen["PROGRAMS"]
    )
    strides = [conv_state_strides(state, layout) for state in states]
    block_tables, columns = block_arguments(blocks)
    traceable(short_conv_qkv_kernel)[(d_blocks * token_blocks,)](
        *three(xs, None), *three(weights, None), *three(biases, None), q, k, v,
        *three(states, None), state_indices, contiguous(has_initial_state), contiguous(cu_seqlens),
        *block_tables, T, value_dim, N, 0 if states[0] is None else states[0].shape[0], columns,
        block_t, blocks_per_sequence, *three([x.stride(0) for x in xs], 0),
        *three([x.stride(1) for x in xs], 0), *three([slot for slot, _, _ in strides], 0),
        *three([row for _, row, _ in strides], 0), strides[0][2],
        0 if state_indices is None else state_indices.stride(0),
        EPS=norm_eps, KEY_DIM=key_dim, K=head_dim, BLOCK_K=block_k, W=W,
        BLOCK_W=triton.next_power_of_2(W), UNPACKED=len(xs) == 3, SILU=activation == "silu",
        HAS_BIAS=biases[0] is not None, HAS_STATE=states[0] is not None,
        HAS_INITIAL=has_initial_state is not None, VARLEN=cu_seqlens is not None,
        BLOCK_TOKENS=0 if blocks is None else blocks.tokens,
        STEP_T=chosen["STEP_T"], BLOCK_D=block_d, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return q, k, v
