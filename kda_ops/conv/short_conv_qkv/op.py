"""The short convolution of q, k and v with the norms of q and k: schemas, fake implementations,
public function.
"""

from typing import Any

import torch
from torch import Tensor

from kda_ops._checks import check_head_dim, check_integer, check_number, check_rank, check_shape
from kda_ops._registry import define_op, selected
from kda_ops._roles import BLOCKS, CONTEXTS, CONV_PAGES, OFFSETS, SLOTS
from kda_ops.blocks import BLOCK_ARGUMENTS, Blocks
from kda_ops.config import resolve_layout
from kda_ops.conv.checks import (
    check_conv_blocks,
    check_conv_sequences,
    check_conv_values,
    conv_parts,
    resolve_activation,
    state_channels,
)
from kda_ops.conv.history import check_history, convolved_behind, states_of
from kda_ops.conv.short_conv_qkv.reference import (
    short_conv_qkv_reference,
    short_conv_qkv_state_reference,
    short_conv_qkv_unpacked_reference,
    short_conv_qkv_unpacked_state_reference,
)
from kda_ops.native import define_native

Parts = tuple[Tensor, Tensor, Tensor]
TABLES = {
    "state_indices": SLOTS,
    "cu_seqlens": OFFSETS,
    "block_table": BLOCKS,
    "context_lens": CONTEXTS,
}


def short_conv_qkv_fake(x: Tensor, key_dim: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    heads = (B, T, key_dim // head_dim, head_dim)
    shapes = (heads, heads, (B, T, D - 2 * key_dim))
    q, k, v = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    return q, k, v


def short_conv_qkv_unpacked_fake(
    q: Tensor, v: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, key_dim = q.shape
    heads = (B, T, key_dim // head_dim, head_dim)
    shapes = (heads, heads, v.shape)
    new_q, new_k, new_v = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)
    return new_q, new_k, new_v


def check_short_conv_qkv_values(x: Tensor, cu_seqlens: Tensor | None) -> None:
    check_conv_values(x, cu_seqlens, None, None)


def check_short_conv_qkv_state_values(
    x: Tensor, conv_state: Tensor, state_indices: Tensor | None, cu_seqlens: Tensor | None,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> None:  # fmt: skip
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    check_conv_values(x, cu_seqlens, conv_state, state_indices, blocks)


def check_short_conv_qkv_unpacked_values(q: Tensor, cu_seqlens: Tensor | None) -> None:
    check_conv_values(q, cu_seqlens, None, None)


def check_short_conv_qkv_unpacked_state_values(
    q: Tensor, q_state: Tensor, state_indices: Tensor | None, cu_seqlens: Tensor | None,
    block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int,
) -> None:  # fmt: skip
    blocks = Blocks.of(block_table, context_lens, block_tokens)
    check_conv_values(q, cu_seqlens, q_state, state_indices, blocks)


short_conv_qkv_op = define_op(
    "short_conv_qkv(Tensor x, Tensor weight, Tensor? bias, str? activation, int key_dim, "
    "int head_dim, float norm_eps, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    reference=short_conv_qkv_reference,
    fake=short_conv_qkv_fake,
    cuda="kda_ops.conv.short_conv_qkv.kernel:launch_short_conv_qkv",
    roles={"cu_seqlens": OFFSETS},
    check_values=check_short_conv_qkv_values,
)

short_conv_qkv_state_op = define_op(
    "short_conv_qkv.state(Tensor x, Tensor weight, Tensor? bias, str? activation, int key_dim, "
    "int head_dim, float norm_eps, Tensor(a!) conv_state, Tensor? state_indices, "
    f"Tensor? has_initial_state, Tensor? cu_seqlens, str layout, {BLOCK_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    reference=short_conv_qkv_state_reference,
    fake=short_conv_qkv_fake,
    cuda="kda_ops.conv.short_conv_qkv.kernel:launch_short_conv_qkv_state",
    roles={"conv_state": CONV_PAGES, **TABLES},
    check_values=check_short_conv_qkv_state_values,
)

_UNPACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
    "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, str? activation, int head_dim, float norm_eps"
)

short_conv_qkv_unpacked_op = define_op(
    f"short_conv_qkv.unpacked({_UNPACKED}, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    reference=short_conv_qkv_unpacked_reference,
    fake=short_conv_qkv_unpacked_fake,
    cuda="kda_ops.conv.short_conv_qkv.kernel:launch_short_conv_qkv_unpacked",
    roles={"cu_seqlens": OFFSETS},
    check_values=check_short_conv_qkv_unpacked_values,
)

short_conv_qkv_unpacked_state_op = define_op(
    f"short_conv_qkv.unpacked_state({_UNPACKED}, Tensor(a!) q_state, Tensor(b!) k_state, "
    "Tensor(c!) v_state, Tensor? state_indices, Tensor? has_initial_state, Tensor? cu_seqlens, "
    f"str layout, {BLOCK_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    reference=short_conv_qkv_unpacked_state_reference,
    fake=short_conv_qkv_unpacked_fake,
    cuda="kda_ops.conv.short_conv_qkv.kernel:launch_short_conv_qkv_unpacked_state",
    roles={
        "q_state": CONV_PAGES,
        "k_state": CONV_PAGES,
        "v_state": CONV_PAGES,
        **TABLES,
    },
    check_values=check_short_conv_qkv_unpacked_state_values,
)
define_native(short_conv_qkv_op, "kda_ops.conv.native:short_conv_qkv")
define_native(short_conv_qkv_state_op, "kda_ops.conv.native:short_conv_qkv_state")
define_native(short_conv_qkv_unpacked_op, "kda_ops.conv.native:short_conv_qkv_unpacked")
define_native(short_conv_qkv_unpacked_state_op, "kda_ops.conv.native:short_conv_qkv_unpacked_state")


def short_conv_qkv(
    x: Tensor | Parts,
    weight: Tensor | Parts,
    bias: Tensor | Parts | None = None,
    *,
    key_dim: int,
    head_dim: int,
    norm_eps: float = 1e-6,
    activation: str | None = "silu",
    conv_state: Tensor | Parts | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    initial_state: Tensor | Parts | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    block_table: Tensor | None = None,
    context_lens: Tensor | None = None,
    block_tokens: int | None = None,
) -> tuple[Any, ...]:
    """Convolved queries, keys and values of whole sequences, with normalized queries and keys, in
    one pass over the packed projections.

    Equals `short_conv` of x (q | k | v along its channels), split into three, and `l2norm` of each
    head of q and k, without rounding in between. State, slots, empty sequences and padding are as
    in `short_conv`: padding tokens and tokens of null slots give zeros.

    Models with separate q, k and v, such as FLA's and Moonshot's, pass x, weight, bias and
    conv_state or initial_state as three tensors each, `(of q, of k, of v)`; they are not packed.

    Source: Kimi Linear (arXiv:2510.26692), section 4.

    Args:
        x: `[B, T, D]`, the packed projections, `D = 2 * key_dim + value_dim`; fp16, bf16 or fp32
            (fp64 on the CPU). With `cu_seqlens`, B is 1. Copied if the last axis is not contiguous.
        weight: `[D, W]`, or `[D, 1, W]` as in `nn.Conv1d`, W at least 2; the last tap applies to
            the token itself.
        bias: `[D]` or None.
        key_dim: Channels of q, and of k: H * K.
        head_dim: K, in `[1, 256]`, a divisor of `key_dim`.
        norm_eps: Added to the sum of squares of each head, positive.
        activation: `"silu"` (also called `"swish"`) or None.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS, `L >= W - 1`, any
            strides, written in place. Its dtype may differ from that of x.
        state_indices: `[N]`, int32 or int64, the slot of each sequence; unique, except those of
            padding. None with `conv_state`: sequence n is page n of at least N, and none is null.
        has_initial_state: `[N]`, bool. None means that no sequence has one.
        initial_state: `[N, W - 1, D]` in layout SD, `[N, D, W - 1]` in layout DS, the tokens before
            each sequence as values; not with `conv_state`. Rounded to x's dtype.
        output_final_state: Whether to return the last W - 1 tokens of each sequence, in that
            layout; not with `conv_state`.
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; empty ones are
            allowed.
        block_table: `[N, blocks]`, int32 or int64, with `conv_state`: the slot of the state after
            each full block of a sequence, of blocks that end in this call; entries that are 0,
            negative or out of range are skipped. Rows from W - 1 on are not touched. See
            `chunk_kda`.
        context_lens: `[N]`, int32 or int64, with `block_table`: the tokens of each sequence before
            this call, multiples of 64. Zeros if None.
        block_tokens: Tokens of a block, a multiple of 64, with `block_table`.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.

    Returns:
        q and k `[B, T, H, K]` and v `[B, T, value_dim]`, each contiguous, in x's dtype; with
        `output_final_state` also the final state, three tensors where x is.

    Raises:
        ValueError: An invalid shape, size, dtype, device, activation, eps, layout, offset or slot,
            or a state argument without `conv_state`.
        RuntimeError: An argument requires grad and `conv_state` is given (the call without a state
            is differentiable).
    """
    activation = resolve_activation(activation)
    state = initial_state if conv_state is None else conv_state
    layout = resolve_layout(layout, *state_channels(x, state))
    parts = conv_parts(x, weight, bias, conv_state, layout)
    histories = states_of(initial_state, len(parts))
    for part, history in zip(parts, histories, strict=True):
        check_rank("x", part[0], 3)
        check_conv_sequences(*part, state_indices, has_initial_state, cu_seqlens, layout)
        past = part[1].shape[1] - 1
        check_history(history, conv_state, part[0], past, cu_seqlens, layout, output_final_state)
    check_conv_blocks(parts, cu_seqlens, block_table, context_lens, block_tokens)
    check_head_dim("head_dim", head_dim)
    check_integer("key_dim", key_dim)
    check_number("norm_eps", norm_eps)
    if key_dim < 1 or key_dim % head_dim:
        raise ValueError(f"key_dim must be a multiple of head_dim = {head_dim}, got {key_dim}")
    if not norm_eps > 0:  # NaN too
        raise ValueError(f"norm_eps must be positive, got {norm_eps}")
    blocks = (block_table, context_lens, block_tokens or 0)
    if len(parts) == 3:
        for (x_part, *_), width in zip(parts, (key_dim, key_dim, None), strict=True):
            check_shape("x", x_part, (*x_part.shape[:2], width or x_part.shape[2]))
        xs, weights, biases, states = zip(*parts, strict=True)
        args = (*xs, *weights, *biases, activation, head_dim, norm_eps)
        if initial_state is not None or output_final_state:
            op, rest = selected(short_conv_qkv_unpacked_op), args[3:]
            results, finals = convolved_behind(
                lambda xs, offsets: op(*xs, *rest, offsets),
                xs, histories, past, cu_seqlens, layout, output_final_state,
            )  # fmt: skip
            return (*results, tuple(finals)) if finals else tuple(results)
        if conv_state is None:
            return selected(short_conv_qkv_unpacked_op)(*args, cu_seqlens)
        return selected(short_conv_qkv_unpacked_state_op)(
            *args, *states, state_indices, has_initial_state, cu_seqlens, layout, *blocks
        )
    ((x, weight, bias, conv_state),) = parts
    if x.shape[-1] <= 2 * key_dim:
        raise ValueError(
            f"x must have shape [B, T, D] with D more than 2 * key_dim = {2 * key_dim}, "
            f"got {tuple(x.shape)}"
        )
    args = (weight, bias, activation, key_dim, head_dim, norm_eps)
    if initial_state is not None or output_final_state:
        packed_op = selected(short_conv_qkv_op)
        results, finals = convolved_behind(
            lambda xs, offsets: packed_op(*xs, *args, offsets),
            [x], histories, past, cu_seqlens, layout, output_final_state,
        )  # fmt: skip
        return (*results, *finals)
    if conv_state is None:
        return selected(short_conv_qkv_op)(x, *args, cu_seqlens)
    return selected(short_conv_qkv_state_op)(
        x, *args, conv_state, state_indices, has_initial_state, cu_seqlens, layout, *blocks
    )
