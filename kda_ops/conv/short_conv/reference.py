"""The short convolution of whole sequences in eager PyTorch."""

from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.conv.formulas import conv_whole as short_conv_reference
from kda_ops.conv.formulas import conv_whole_state

__all__ = ["short_conv_reference", "short_conv_state_reference"]


def short_conv_state_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    return conv_whole_state(
        x, weight, bias, activation, conv_state, state_indices, has_initial_state, cu_seqlens,
        layout, Blocks.of(block_table, context_lens, block_tokens),
    )  # fmt: skip
