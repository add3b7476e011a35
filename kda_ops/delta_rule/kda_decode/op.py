"""A whole decode step: schema, fake implementation, public function."""

import math

import torch
from torch import Tensor

from kda_ops._checks import (
    check_beta_scale,
    check_cu_seqlens_shape,
    check_device,
    check_dtype,
    check_gate_parameters,
    check_not_negative,
    check_number,
    check_paged_state,
    check_pages,
    check_rank,
    check_shape,
    check_slot_values,
    check_step_tables,
    check_step_values,
    check_tensor,
    check_width,
    rates_of,
)
from kda_ops._registry import define_op, selected
from kda_ops._roles import CONV_PAGES, OFFSETS, SLOTS, STATE_PAGES
from kda_ops.config import resolve_layout
from kda_ops.conv.checks import (
    check_conv,
    check_conv_state,
    conv_parts,
    resolve_activation,
    state_channels,
)
from kda_ops.delta_rule.kda_decode.reference import (
    kda_decode_reference,
    kda_decode_unpacked_reference,
)
from kda_ops.native import define_native

MOST_TOKENS = 8
Parts = tuple[Tensor, Tensor, Tensor]


def kda_decode_fake(x: Tensor, output_gate: Tensor) -> Tensor:
    return torch.empty((1, x.shape[0], *output_gate.shape[-2:]), dtype=x.dtype, device=x.device)


def kda_decode_unpacked_fake(q: Tensor, output_gate: Tensor) -> Tensor:
    return kda_decode_fake(q, output_gate)


def check_kda_decode_values(
    x: Tensor, conv_state: Tensor, weight: Tensor, state: Tensor, state_indices: Tensor | None,
    num_accepted: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> None:  # fmt: skip
    check_step_values(state, state_indices, num_accepted, cu_seqlens, x.shape[0])
    most = conv_tokens(conv_state, weight, layout)
    if cu_seqlens is not None:
        longest = max(cu_seqlens.diff().tolist(), default=0)
        if longest > most:
            raise ValueError(
                f"cu_seqlens must have at most {most} tokens per sequence for a conv_state of "
                f"shape {tuple(conv_state.shape)}, got {longest}"
            )
    if state_indices is None:
        return
    table = state_indices if state_indices.dim() == 2 else state_indices[:, None]
    check_slot_values("state_indices", table[:, 0], conv_state.shape[0])
    if num_accepted is not None:
        bad = ((num_accepted > most) & (table > 0).any(dim=1)).nonzero()
        if len(bad):
            raise ValueError(
                f"num_accepted must be at most {most} for a conv_state of shape "
                f"{tuple(conv_state.shape)}, got {int(num_accepted[bad[0]])}"
            )


def check_kda_decode_unpacked_values(
    q: Tensor, q_state: Tensor, q_weight: Tensor, state: Tensor, state_indices: Tensor | None,
    num_accepted: Tensor | None, cu_seqlens: Tensor | None, layout: str,
) -> None:  # fmt: skip
    check_kda_decode_values(
        q, q_state, q_weight, state, state_indices, num_accepted, cu_seqlens, layout
    )


def conv_tokens(conv_state: Tensor, weight: Tensor, layout: str) -> int:
    """The most tokens per step that fit a convolution state."""
    return conv_state.shape[1 if layout == "SD" else 2] - weight.shape[1] + 2


_STEP = (
    "str? activation, Tensor raw_gate, Tensor raw_beta, Tensor output_gate, Tensor? A_log, "
    "Tensor? dt_bias, float? lower_bound, float beta_scale, Tensor norm_weight, float norm_eps, "
    "float qk_norm_eps, float scale, Tensor(d!) state, Tensor? state_indices, "
    "Tensor? num_accepted, Tensor? cu_seqlens, str state_layout, str layout"
)

kda_decode_op = define_op(
    f"kda_decode(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, {_STEP}) -> Tensor",
    reference=kda_decode_reference,
    fake=kda_decode_fake,
    cuda="kda_ops.delta_rule.kda_decode.kernel:launch_kda_decode",
    roles={
        "conv_state": CONV_PAGES,
        "state": STATE_PAGES,
        "state_indices": SLOTS,
        "cu_seqlens": OFFSETS,
    },
    check_values=check_kda_decode_values,
)

kda_decode_unpacked_op = define_op(
    "kda_decode.unpacked(Tensor q, Tensor k, Tensor v, Tensor(a!) q_state, Tensor(b!) k_state, "
    "Tensor(c!) v_state, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, "
    f"Tensor? k_bias, Tensor? v_bias, {_STEP}) -> Tensor",
    reference=kda_decode_unpacked_reference,
    fake=kda_decode_unpacked_fake,
    cuda="kda_ops.delta_rule.kda_decode.kernel:launch_kda_decode_unpacked",
    roles={
        "q_state": CONV_PAGES,
        "k_state": CONV_PAGES,
        "v_state": CONV_PAGES,
        "state": STATE_PAGES,
        "state_indices": SLOTS,
        "cu_seqlens": OFFSETS,
    },
    check_values=check_kda_decode_unpacked_values,
)
define_native(kda_decode_op, "kda_ops.delta_rule.native_decode:kda_decode", looks_itself=True)
define_native(
    kda_decode_unpacked_op,
    "kda_ops.delta_rule.native_decode:kda_decode_unpacked",
    looks_itself=True,
)


def kda_decode(
    x: Tensor | Parts,
    conv_state: Tensor | Parts,
    weight: Tensor | Parts,
    bias: Tensor | Parts | None = None,
    *,
    activation: str | None = "silu",
    raw_gate: Tensor,
    raw_beta: Tensor,
    output_gate: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_scale: float = 1.0,
    norm_weight: Tensor,
    norm_eps: float = 1e-5,
    qk_norm_eps: float = 1e-6,
    scale: float | None = None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    state_layout: str = "VK",
) -> Tensor:
    """A decode step of one or a few tokens per sequence: everything a KDA layer does between its
    projections; both states are written in place.

    Equals `short_conv_update` of the packed projections, `l2norm` of q and k, `gate`,
    `recurrent_kda` with `beta_scale * sigmoid(raw_beta)`, and `rms_norm_gated`, without rounding in
    between. Both states of a sequence use the same slots: the convolution state that of column 0 of
    `state_indices`, the recurrent state as in `recurrent_kda`.

    Models with separate q, k and v, such as FLA's and Moonshot's, pass x, conv_state, weight and
    bias as three tensors each, `(of q, of k, of v)`; they are not packed.

    Slot 0 is the null block, and a negative slot is as good: a sequence on one is padding, its
    output is zero and its states are not written. Two sequences never share a slot. Source:
    Kimi Linear (arXiv:2510.26692), sections 3 and 4.

    Args:
        x: `[T, D]`, the packed projections q | k | v of all tokens, `D = 2 H K + HV V`; fp16, bf16
            or fp32 (fp64 on the CPU). Value head i uses key head `i // (HV // H)`.
        conv_state: `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS, `L >= W - 2 + q` for
            q tokens per sequence; any strides: pages may be padded.
        weight: `[D, W]`, or `[D, 1, W]` as in `nn.Conv1d`, W at least 2; the last tap applies to
            the token itself.
        bias: `[D]` or None.
        activation: `"silu"` (also called `"swish"`) or None.
        raw_gate: `[..., HV, K]` with T leading elements, the gate's input.
        raw_beta: `[..., HV]`, before its sigmoid.
        output_gate: `[..., HV, V]`, the output gate before its sigmoid.
        A_log: `[HV]` or `[1, 1, HV, 1]`, natural log of the decay rate; None means a rate of 1 and
            needs `lower_bound`.
        dt_bias: `[HV, K]` or `[HV * K]`, added to raw_gate.
        lower_bound: None, or a bound of the gate in `[-5, 0)` in **nats**; see `gate`.
        beta_scale: 1, or 2 for eigenvalues down to -1.
        norm_weight: `[V]`.
        norm_eps: Added to the mean of squares of the output.
        qk_norm_eps: Added to the sum of squares of q and of k.
        scale: Scale of the output, `K ** -0.5` by default.
        state: `[slots, HV, V, K]`, or `[slots, HV, K, V]` in state layout KV; fp32 or bf16 (fp64
            on the CPU), any strides.
        state_indices: `[N]` or `[N, 1 + num_spec]`, int32 or int64; see `recurrent_kda`.
        num_accepted: `[N]`, int32 or int64, in `[1, 1 + num_spec]`: accepted tokens of the previous
            step. Only with a two-dimensional `state_indices`; None means 1.
        cu_seqlens: `[N + 1]`, int32 or int64, token offsets of the sequences; first 0,
            non-decreasing, empty sequences allowed, last at most T. A sequence has at most
            `L - W + 2` tokens, and `L - W + 2` is at most 8. None: every sequence has one token.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.
        state_layout: `"VK"` or `"KV"`; see `recurrent_kda`.

    Returns:
        `[1, T, HV, V]` in x's dtype, contiguous; padding rows are zero.

    Raises:
        ValueError: An invalid shape, dtype, device, activation, layout or eps; on the CPU, or with
            `kda_ops.config.check_values`, also offsets, slots and counts. On CUDA without the
            checks a slot out of range is treated as null and `num_accepted` is clamped.
        RuntimeError: An argument requires grad while grad mode is on.
    """
    activation = resolve_activation(activation)
    layout = resolve_layout(layout, *state_channels(x, conv_state))
    parts = conv_parts(x, weight, bias, conv_state, layout)
    xs, weights, biases, conv_states = zip(*parts, strict=True)
    for x_part, weight_part, bias_part, conv_part in parts:
        check_rank("x", x_part, 2)
        check_conv(x_part, weight_part, bias_part)
        check_conv_state(conv_part, layout, x_part.shape[1], weight_part.shape[1])
    T, D = xs[0].shape[0], sum(x_part.shape[1] for x_part in xs)
    check_gate_parameters(raw_gate, A_log, dt_bias, lower_bound)
    HV, K = raw_gate.shape[-2:]
    check_tensor("output_gate", output_gate)
    if output_gate.dim() < 2 or output_gate.shape[-2] != HV:
        raise ValueError(
            f"output_gate must have shape [..., {HV}, V], got {tuple(output_gate.shape)}"
        )
    V = output_gate.shape[-1]
    check_tokens("raw_gate", raw_gate, T, 2)
    check_tokens("output_gate", output_gate, T, 2)
    check_tokens("raw_beta", raw_beta, T, 1)
    check_shape("raw_beta", raw_beta, (*raw_beta.shape[:-1], HV))
    check_width("raw_gate", K)
    check_width("output_gate", V)
    H = (D - HV * V) // (2 * K)
    if D != 2 * H * K + HV * V or H < 1 or HV % H:
        raise ValueError(
            f"x must have shape [T, 2 H K + {HV * V}] with K = {K} and H a divisor of {HV}, "
            f"got {tuple(xs[0].shape)}"
        )
    if len(xs) == 3:
        for x_part, width in zip(xs, (H * K, H * K, HV * V), strict=True):
            check_shape("x", x_part, (T, width))
    check_shape("norm_weight", norm_weight, (V,))
    check_dtype("raw_beta", raw_beta)
    check_dtype("output_gate", output_gate)
    check_dtype("norm_weight", norm_weight)
    check_not_negative("norm_eps", norm_eps)
    check_not_negative("qk_norm_eps", qk_norm_eps)
    check_paged_state(state, HV, V, K, state_layout)
    sequences = T
    if cu_seqlens is not None:
        check_cu_seqlens_shape(cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
        most = conv_tokens(conv_states[0], weights[0], layout)
        if most > MOST_TOKENS:
            raise ValueError(
                f"conv_state must have L at most {MOST_TOKENS + weights[0].shape[1] - 2} with "
                f"cu_seqlens, got {tuple(conv_states[0].shape)} in layout {layout}"
            )
    check_step_tables(state_indices, num_accepted, sequences)
    check_pages("conv_state", conv_states[0], state_indices, sequences)
    check_pages("state", state, state_indices, sequences)
    for x_part, weight_part, bias_part, conv_part in parts:
        check_device(x=x_part, conv_state=conv_part, weight=weight_part, bias=bias_part)
    check_device(
        x=xs[0], x_v=xs[-1], raw_gate=raw_gate, raw_beta=raw_beta, output_gate=output_gate,
        norm_weight=norm_weight, state=state, state_indices=state_indices,
        num_accepted=num_accepted, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    scale = K**-0.5 if scale is None else scale
    check_number("scale", scale)
    check_beta_scale(beta_scale)
    step = (
        activation, raw_gate, raw_beta, output_gate, rates_of(A_log), dt_bias, lower_bound,
        beta_scale, norm_weight, norm_eps, qk_norm_eps, scale, state, state_indices, num_accepted,
        cu_seqlens, state_layout, layout,
    )  # fmt: skip
    op = selected(kda_decode_op if len(parts) == 1 else kda_decode_unpacked_op)
    return op(*xs, *conv_states, *weights, *biases, *step)


def check_tokens(name: str, x: Tensor, T: int, trailing: int) -> None:
    """`x` has T tokens in the axes before the last `trailing` ones."""
    check_tensor(name, x)
    if x.dim() < trailing or math.prod(x.shape[: x.dim() - trailing]) != T:
        raise ValueError(f"{name} must have {T} tokens like x, got shape {tuple(x.shape)}")
