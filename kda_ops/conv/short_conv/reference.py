"""The short convolution of whole sequences in eager PyTorch."""

from torch import Tensor

from kda_ops.conv.formulas import conv_whole, conv_whole_state


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    return conv_whole(x, weight, bias, activation, cu_seqlens)


def short_conv_state_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    state_indices: Tensor, has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> Tensor:  # fmt: skip
    return conv_whole_state(
        x, weight, bias, activation, conv_state, state_indices, has_initial_state, cu_seqlens,
        layout,
    )  # fmt: skip
