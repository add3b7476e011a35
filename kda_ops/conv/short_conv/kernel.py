"""The short convolution of whole sequences as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.blocks import Blocks, block_arguments
from kda_ops.conv.kernel import conv_blocks, conv_sequence, conv_state_strides
from kda_ops.tuning import choose


@triton.jit
def short_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, state_ptr, slots_ptr, has_initial_ptr, cu_seqlens_ptr,
    blocks_ptr, contexts_ptr,
    T, D, N, num_slots, columns,
    block_t, blocks_per_sequence,
    stride_x_batch, stride_x_row, stride_state_slot, stride_state_row, stride_state_dim,
    stride_slots,
    W: tl.constexpr, BLOCK_W: tl.constexpr, STEP_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    VARLEN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program computes block_t tokens of one sequence x BLOCK_D channels; see `conv_sequence`.

    Grid: token blocks x D blocks, D fastest, on the only axis without a limit of 65535.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    pid = (tl.program_id(0) // d_blocks).to(tl.int64)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < D
    blocks = (blocks_ptr, columns, contexts_ptr)
    conv_sequence(
        x_ptr, weight_ptr, bias_ptr, y_ptr, state_ptr, slots_ptr, has_initial_ptr, cu_seqlens_ptr,
        blocks, pid, d, ok, False, T, N, num_slots, block_t, blocks_per_sequence, stride_x_batch,
        stride_x_row, D, stride_state_slot, stride_state_row, stride_state_dim, stride_slots, W,
        BLOCK_W, STEP_T, BLOCK_D, SILU, HAS_BIAS, HAS_STATE, HAS_INITIAL, VARLEN, BLOCK_TOKENS,
        EPS=0.0, HEADS=0, PADDED=False,
    )  # fmt: skip


def launch_short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    return _launch(x, weight, bias, activation, None, None, None, cu_seqlens, "SD", None)


def launch_short_conv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    return _launch(
        x, weight, bias, activation, conv_state, state_indices, has_initial_state, cu_seqlens,
        layout, Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    conv_state: Tensor | None, state_indices: Tensor | None, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, layout: str, blocks: Blocks | None,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    T, D = x.shape[-2:]
    W = int(weight.shape[1])
    batch, stride_batch = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    chosen = choose("short_conv", x.device, D=D, W=W, dtype=x.dtype)
    d_blocks = triton.cdiv(D, chosen["BLOCK_D"])
    block_t, blocks_per_sequence, N, token_blocks = conv_blocks(
        batch, T, cu_seqlens, d_blocks, chosen["STEP_T"], chosen["MAX_STEPS"], chosen["PROGRAMS"]
    )
    stride_slot, stride_row, stride_dim = conv_state_strides(conv_state, layout)
    block_tables, columns = block_arguments(blocks)
    traceable(short_conv_kernel)[(d_blocks * token_blocks,)](
        x, weight.contiguous(), contiguous(bias), y, conv_state, state_indices,
        contiguous(has_initial_state), contiguous(cu_seqlens), *block_tables, T, D, N,
        0 if conv_state is None else conv_state.shape[0], columns, block_t, blocks_per_sequence,
        stride_batch, x.stride(-2), stride_slot, stride_row, stride_dim,
        0 if state_indices is None else state_indices.stride(0),
        W=W, BLOCK_W=triton.next_power_of_2(W), SILU=activation == "silu",
        HAS_BIAS=bias is not None, HAS_STATE=conv_state is not None,
        HAS_INITIAL=has_initial_state is not None, VARLEN=cu_seqlens is not None,
        BLOCK_TOKENS=0 if blocks is None else blocks.tokens,
        STEP_T=chosen["STEP_T"], BLOCK_D=chosen["BLOCK_D"], num_warps=chosen["num_warps"],
    )  # fmt: skip
    return y
