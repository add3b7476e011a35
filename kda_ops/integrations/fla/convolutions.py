"""The convolutions by flash-linear-attention's names, and its packing of padded rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.conv.checks import resolve_activation
from kda_ops.conv.history import last_rows
from kda_ops.conv.short_conv import short_conv
from kda_ops.integrations.fla.refusals import check_names, check_offered

CONV_BACKENDS = ("triton", "cuda", "mix")


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.causal_conv1d`: whole sequences, with gradients of everything.

    Args:
        x: `[B, T, D]`, or with D split in more axes.
        weight: `[D, W]`.
        bias: `[D]`.
        residual: Shape of x, added to the result.
        initial_state: `[N, D, W]`, the last W tokens before.
        output_final_state: Whether to return the last W tokens of each sequence.
        activation: `"silu"` (also called `"swish"`) or None.
        backend: Ignored, one of FLA's.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        cu_seqlens_cpu: Ignored.
        chunk_indices: Ignored.
        cp_context: Refused.
        **kwargs: `seq_idx`, ignored.

    Returns:
        The result in the shape of x, and `[N, D, W]` in its dtype or None.

    Raises:
        ValueError: No `weight`, `cp_context`, or what `kda_ops.short_conv` refuses.
        TypeError: An argument that is not known.
    """
    check_names(kwargs, "seq_idx")
    check_offered(cp_context)
    if backend not in CONV_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(CONV_BACKENDS)}, got {backend!r}")
    weight = _check_weight(weight)
    rows = x.flatten(2)
    history = None if initial_state is None else initial_state[..., 1:]  # FLA keeps one token more
    y = short_conv(
        rows, weight, bias, activation=activation, initial_state=history, cu_seqlens=cu_seqlens,
        layout="DS",
    ).reshape(x.shape)  # fmt: skip
    final = None
    if output_final_state:
        kept = None if initial_state is None else initial_state.mT
        final = last_rows(rows, weight.shape[-1], kept, cu_seqlens).mT.contiguous()
    return (y if residual is None else y + residual), final


def _check_weight(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("weight must be given, got None")
    return weight


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`fla.modules.causal_conv1d.causal_conv1d_update`: one token of each sequence.

    Args:
        x: `[N, D]`, `[N, 1, D]` or `[1, N, D]`, or with D split in more axes.
        cache: `[N, D, W]`, the last W tokens, written in place.
        residual: Shape of x, added to the result.
        weight: `[D, W]`.
        bias: `[D]`.
        activation: `"silu"` (also called `"swish"`) or None.

    Returns:
        The result in the shape of x, and the cache.

    Raises:
        ValueError: No `weight`, or an unknown activation.
    """
    weight = _check_weight(weight)
    window = torch.cat([cache[..., 1:], x.reshape(-1, weight.shape[0], 1).to(cache.dtype)], dim=-1)
    cache.copy_(window)
    dtype = accumulation_dtype(x)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    y = y if resolve_activation(activation) is None else F.silu(y)
    y = y.to(x.dtype).reshape(x.shape)
    return (y if residual is None else y + residual), cache


def short_convolution_forward(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.ShortConvolution.forward`; `x` is not multiplied by the mask in place.

    Args:
        self: The module.
        x: `[B, T, D]`.
        residual: Shape of x, added to the result.
        mask: `[B, T]`, 0 for padding.
        cache: `[N, D, W]`. Without autograd, a call of one token for every sequence writes it.
        output_final_state: Whether to return the last W tokens of each sequence.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        chunk_indices: Ignored.
        **kwargs: As `causal_conv1d`.

    Returns:
        The result in the shape of x, and `[N, D, W]` or None.

    Raises:
        ValueError: `mask` with `cu_seqlens`, or what `causal_conv1d` refuses.
    """
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError("mask must be None with cu_seqlens")
        x = x * mask.unsqueeze(-1)
    T = x.shape[1]
    written = cache if not torch.is_grad_enabled() else None
    if written is not None and cu_seqlens is None and T == 1:
        return self.step(x, residual, cache, output_final_state)
    y, final = causal_conv1d(
        x,
        self.weight.squeeze(1),
        self.bias,
        residual,
        cache,
        output_final_state or written is not None,
        self.activation,
        cu_seqlens=cu_seqlens,
        **kwargs,
    )
    if written is not None and cu_seqlens is not None and cu_seqlens.shape[0] - 1 == T:
        assert final is not None
        # whether each has one token is decided on the device, for a graph without a break
        each = (cu_seqlens.diff() == 1).all()
        written.copy_(torch.where(each, final.to(written.dtype), written))
    return y, final if output_final_state else None


def short_convolution_step(
    self: Any,
    x: Tensor,
    residual: Tensor | None,
    cache: Tensor | None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.ShortConvolution.step`: one token of each sequence.

    Args:
        self: The module.
        x: `[N, 1, D]`, or with `cu_seqlens` `[1, N, D]`.
        residual: Shape of x, added to the result.
        cache: `[N, D, W]`, written in place; zeros if None.
        output_final_state: Whether to return the cache.
        cu_seqlens: `[N + 1]`.

    Returns:
        The result in the shape of x, and the cache or None.
    """
    weight = self.weight.squeeze(1)
    if cache is None:
        cache = x.new_zeros(x.shape[0] * x.shape[1], *weight.shape)
    y, cache = causal_conv1d_update(x, cache, residual, weight, self.bias, self.activation)
    return y, cache if output_final_state else None


def unpad_hidden_states(
    hidden_states: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    q_len: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """FLA's, for its KDA layer, in tensors of a fixed size: padding goes after the last sequence.

    Args:
        hidden_states: `[B, T, D]`.
        cu_seqlens: Given, nothing is packed.
        attention_mask: `[B, S]`, 0 for padding, of which the last `q_len` columns are used.
        q_len: T.

    Returns:
        `[1, B * T, D]`, the row of each token there (`[B * T]`, beyond the last one for padding),
        and `cu_seqlens`.
    """
    if cu_seqlens is not None or attention_mask is None:
        return hidden_states, None, cu_seqlens
    real = attention_mask[:, -q_len:] != 0
    flat = real.flatten()
    rows = flat.numel()
    place = torch.where(flat, flat.cumsum(0) - 1, rows)
    packed = hidden_states.new_zeros(rows + 1, hidden_states.shape[-1])
    packed = packed.index_copy(0, place, hidden_states.flatten(0, 1))
    lengths = real.sum(-1, dtype=torch.int32)
    return packed[None, :-1], place, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def repad_hidden_states(
    hidden_states: Tensor, indices: Tensor | None, batch_size: int, q_len: int
) -> Tensor:
    """The inverse of `unpad_hidden_states`.

    Args:
        hidden_states: `[1, B * T, D]`.
        indices: `[B * T]`, or None, and nothing is done.
        batch_size: B.
        q_len: T.

    Returns:
        `[B, T, D]`, zeros for padding.
    """
    if indices is None:
        return hidden_states
    padded = F.pad(hidden_states[0], (0, 0, 0, 1))
    return padded[indices].unflatten(0, (batch_size, q_len))
