"""The short convolution of q, k and v with the norms of q and k, in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.blocks import Blocks
from kda_ops.conv.formulas import conv_whole, conv_whole_state, packed_bias, packed_state
from kda_ops.norm.formulas import l2_normalized


def short_conv_qkv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = x.to(accumulation_dtype(x))
    y = conv_whole(wide, weight, bias, activation, cu_seqlens)
    return normed_parts(y, key_dim, head_dim, norm_eps, x.dtype)


def short_conv_qkv_state_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, conv_state: Tensor, state_indices: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = x.to(accumulation_dtype(x))
    y = conv_whole_state(
        wide, weight, bias, activation, conv_state, state_indices, has_initial_state, cu_seqlens,
        layout, Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip
    return normed_parts(y, key_dim, head_dim, norm_eps, x.dtype)


def short_conv_qkv_unpacked_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return short_conv_qkv_reference(
        torch.cat([q, k, v], dim=-1), torch.cat([q_weight, k_weight, v_weight]),
        packed_bias(q_bias, k_bias, v_bias), activation, q.shape[-1], head_dim, norm_eps,
        cu_seqlens,
    )  # fmt: skip


def short_conv_qkv_unpacked_state_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, q_state: Tensor, k_state: Tensor, v_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with packed_state((q_state, k_state, v_state), layout) as conv_state:
        return short_conv_qkv_state_reference(
            torch.cat([q, k, v], dim=-1), torch.cat([q_weight, k_weight, v_weight]),
            packed_bias(q_bias, k_bias, v_bias), activation, q.shape[-1], head_dim, norm_eps,
            conv_state, state_indices, has_initial_state, cu_seqlens, layout, block_table,
            context_lens, block_tokens,
        )  # fmt: skip


def normed_parts(
    y: Tensor, key_dim: int, head_dim: int, norm_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Q and k, with each head normalized, and v of the convolved `y [B, T, D]`."""
    q, k, v = y.split([key_dim, key_dim, y.shape[-1] - 2 * key_dim], dim=-1)
    q, k = (
        l2_normalized(part.unflatten(-1, (-1, head_dim)), norm_eps).to(dtype).contiguous()
        for part in (q, k)
    )
    return q, k, v.clone(memory_format=torch.contiguous_format).to(dtype)
