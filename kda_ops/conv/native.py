"""The short convolution of whole sequences in C++: arguments as those of the operators."""

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kda_ops.blocks import Blocks
from kda_ops.conv.formulas import keep_blocks, keep_last, known_history
from kda_ops.native import address, fp32, kernel
from kda_ops.varlen import pages_of, sequence_offsets

_ARGUMENTS = (c_void_p, c_int64, *6 * (c_void_p,), *5 * (c_int64,), c_double, c_int64)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    return _convolve(x, weight, bias, activation, cu_seqlens)


def short_conv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, conv_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> Tensor:  # fmt: skip
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    pages = (state_indices, has_initial_state, layout, blocks)
    return _convolve(x, weight, bias, activation, cu_seqlens, conv_state, pages)


def short_conv_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = _unpacked(x, weight, bias, None, key_dim, "")
    return _qkv(parts, activation, head_dim, norm_eps, cu_seqlens)


def short_conv_qkv_state(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, key_dim: int,
    head_dim: int, norm_eps: float, conv_state: Tensor, state_indices: Tensor | None,
    has_initial_state: Tensor | None, cu_seqlens: Tensor | None, layout: str,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = _unpacked(x, weight, bias, conv_state, key_dim, layout)
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    pages = (state_indices, has_initial_state, layout, blocks)
    return _qkv(parts, activation, head_dim, norm_eps, cu_seqlens, pages)


def short_conv_qkv_unpacked(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = [(q, q_weight, q_bias, None), (k, k_weight, k_bias, None), (v, v_weight, v_bias, None)]
    return _qkv(parts, activation, head_dim, norm_eps, cu_seqlens)


def short_conv_qkv_unpacked_state(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, activation: str | None,
    head_dim: int, norm_eps: float, q_state: Tensor, k_state: Tensor, v_state: Tensor,
    state_indices: Tensor | None, has_initial_state: Tensor | None, cu_seqlens: Tensor | None,
    layout: str, block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = [
        (q, q_weight, q_bias, q_state),
        (k, k_weight, k_bias, k_state),
        (v, v_weight, v_bias, v_state),
    ]
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    pages = (state_indices, has_initial_state, layout, blocks)
    return _qkv(parts, activation, head_dim, norm_eps, cu_seqlens, pages)


Part = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, weight, bias, convolution state
# slots, has_initial_state, layout, blocks
Pages = tuple[Tensor | None, Tensor | None, str, Blocks | None]


def _unpacked(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None, key_dim: int,
    layout: str,
) -> list[Part]:  # fmt: skip
    """The packed arguments of q, k and v as views for each."""
    sizes = [key_dim, key_dim, x.shape[-1] - 2 * key_dim]
    none = [None] * 3
    return list(
        zip(
            x.split(sizes, -1),
            weight.split(sizes),
            none if bias is None else bias.split(sizes),
            none if conv_state is None else conv_state.split(sizes, 2 if layout == "SD" else 1),
            strict=True,
        )
    )


def _qkv(
    parts: list[Part],
    activation: str | None,
    head_dim: int,
    norm_eps: float,
    cu_seqlens: Tensor | None,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        _convolve(x, weight, bias, activation, cu_seqlens, conv_state, pages, norm)
        for (x, weight, bias, conv_state), norm in zip(
            parts, [(head_dim, norm_eps)] * 2 + [NO_NORM], strict=True
        )
    )
    heads = (*q.shape[:2], q.shape[2] // head_dim, head_dim)
    return q.view(heads), k.view(heads), v


NO_NORM = (0, 0.0)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None = None,
    pages: Pages | None = None,
    norm: tuple[int, float] = NO_NORM,
) -> Tensor:
    """`conv_whole` or `conv_whole_state`, and the norm of heads of a width, if not 0."""
    rows = x if x.dim() == 3 else x[None]
    offsets = sequence_offsets(rows, cu_seqlens)
    N, (D, W) = len(offsets) - 1, weight.shape
    history = None
    state_indices, has_initial_state, layout, blocks = pages or (None, None, "SD", None)
    index, live = pages_of(state_indices, N, x.device)
    if conv_state is not None:
        known = known_history(rows, W - 1, conv_state, index, live, has_initial_state, layout)
        history = known.contiguous()
    flat = fp32(rows.flatten(0, 1))
    whole = bool(live.all()) and (N == 0 or int(offsets[-1]) == len(flat))
    y = flat.new_empty(flat.shape) if whole and N else flat.new_zeros(flat.shape)
    kept = [weight.float().contiguous(), None if bias is None else bias.float().contiguous()]
    kernel("short_conv", *_ARGUMENTS)(
        flat.data_ptr(), flat.stride(0), *map(address, (*kept, history, y, offsets, live)),
        *(N, D, W, activation == "silu", norm[0]), norm[1], torch.get_num_threads(),
    )  # fmt: skip
    if history is not None and conv_state is not None:
        keep_blocks(rows, W - 1, conv_state, live, cu_seqlens, layout, blocks)
        keep_last(rows, history, conv_state, index, live, cu_seqlens, layout)
    return y.to(x.dtype).view(x.shape)
