"""A whole decode step as one Triton kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.conv.kernel import (
    conv_state_strides,
    conv_taps,
    convolved,
    rows_at,
    shift_history,
    three,
)
from kda_ops.delta_rule.kernel import (
    flat_rows,
    over_v,
    rounded_product,
    slot_table,
    update_state,
)
from kda_ops.delta_rule.state_layout import state_strides
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import bias_row
from kda_ops.tuning import choose

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
FEW = 4  # up to this many sequences narrower lines are faster, measured with 32 heads


@triton.jit
def step_of(
    n, cu_ptr, indices_ptr, accepted_ptr, N, T, columns, L,
    stride_indices_row, stride_indices_column,
    W: tl.constexpr, HAS_ACCEPTED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """First row and tokens of sequence n, the slot of its convolution state, the source slot of its
    recurrent state, and the row offset of its history. In bounds for any offsets and counts.
    Without slots sequence n is on page n.
    """
    first = n
    length = tl.where(n < N, 1, 0).to(tl.int64)
    if VARLEN:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + n).to(tl.int64), 0), T)
        end = tl.load(cu_ptr + n + 1, mask=n < N, other=T).to(tl.int64)
        length = tl.minimum(tl.maximum(end, first), T) - first
    if indices_ptr is None:
        slot = tl.where(n < N, n, -1)
    else:
        slot = tl.load(indices_ptr + n * stride_indices_row, mask=n < N, other=0).to(tl.int64)
    source = slot
    past = length * 0
    if HAS_ACCEPTED:
        accepted = tl.load(accepted_ptr + n, mask=n < N, other=1).to(tl.int64) - 1
        column = tl.minimum(tl.maximum(accepted, 0), columns - 1)
        past = tl.minimum(tl.maximum(accepted, 0), L - (W - 1))
        source_ptr = indices_ptr + n * stride_indices_row + column * stride_indices_column
        source = tl.load(source_ptr, mask=n < N, other=0).to(tl.int64)
    return first, length, slot, source, past


@triton.jit
def store_normed(
    o_ptr, hv, outputs, gates, tokens, live, EPS: tl.constexpr, HV: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Stores the outputs of value head hv, normalized and gated."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    for i in tl.static_range(TOKENS):
        squares = 0.0
        for block in tl.static_range(V_BLOCKS):
            o = outputs[block * TOKENS + i]
            squares += tl.sum(rounded_product(o, o), axis=0)
        factor = tl.rsqrt(squares / V + EPS)
        for block in tl.static_range(V_BLOCKS):
            i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
            y = outputs[block * TOKENS + i] * factor * gates[block * TOKENS + i]
            y_ptr = o_ptr + i * (HV * V) + hv * V + i_v
            y_ok = (i_v < V) & live & (i < tokens)
            tl.store(y_ptr, y.to(o_ptr.dtype.element_ty), mask=y_ok)


@triton.jit
def clear_rows(
    o_ptr, hv, first, end, HV: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Zeroes rows of value head hv: padding, and tokens beyond the capacity of a state."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    for i in range(first, end):
        for block in tl.static_range(V_BLOCKS):
            i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
            zero = tl.zeros([BLOCK_V], o_ptr.dtype.element_ty)
            tl.store(o_ptr + i * (HV * V) + hv * V + i_v, zero, mask=i_v < V)


@triton.jit
def kda_decode_kernel(
    x_ptr, x_k_ptr, x_v_ptr, conv_ptr, conv_k_ptr, conv_v_ptr, weight_ptr, weight_k_ptr,
    weight_v_ptr, bias_ptr, bias_k_ptr, bias_v_ptr, gate_ptr, beta_ptr, output_gate_ptr, A_log_ptr,
    dt_bias_ptr, norm_weight_ptr, state_ptr, indices_ptr, accepted_ptr, cu_ptr, o_ptr,
    N, T, conv_slots, slots, columns, L,
    stride_x_row, stride_x_row_k, stride_x_row_v, stride_conv_slot, stride_conv_slot_k,
    stride_conv_slot_v, stride_conv_row, stride_conv_row_k, stride_conv_row_v, stride_conv_dim,
    stride_gate_row, stride_gate_head, stride_beta_row, stride_beta_head, stride_output_row,
    stride_output_head, stride_state_slot, stride_state_head, stride_indices_row,
    stride_indices_column,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA_SCALE: tl.constexpr,
    NORM_EPS: tl.constexpr, QK_NORM_EPS: tl.constexpr, STRIDE_STATE_V: tl.constexpr,
    STRIDE_STATE_K: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, INNER_K: tl.constexpr, V_FIRST: tl.constexpr,
    UNPACKED: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_A: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, BOUNDED: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program takes all tokens of one sequence through one key head and its value heads.

    Grid: sequences x H, heads fastest; with `cu_seqlens` one more sequence, the rows after the last
    one, which is skipped. A program owns its channels of both states, so it may write them in
    place, and whole rows of V, so it can norm its own output.

    Loads that need no slot go first, then the convolution's history, then the state, so that
    everything else overlaps with loading the state. A tile of the state is [BLOCK_V, OUTER_K,
    INNER_K]: fewer lanes share a row than in [BLOCK_V, BLOCK_K], so most of a sum over K stays
    within a thread. Without V_FIRST it is [OUTER_K, BLOCK_V, INNER_K], see `tile_of`. Tiles of
    BLOCK_V rows are processed in order.

    With UNPACKED each of q, k and v has its own input, weight, bias and convolution state;
    otherwise the first pointers are to tensors of all channels, q | k | v, and those of k and v are
    None.
    """
    if not UNPACKED:
        x_k_ptr = x_ptr + H * K
        x_v_ptr = x_k_ptr + H * K
        weight_k_ptr = weight_ptr + H * K * W
        weight_v_ptr = weight_k_ptr + H * K * W
        if HAS_BIAS:
            bias_k_ptr = bias_ptr + H * K
            bias_v_ptr = bias_k_ptr + H * K
        wide = tl.full((), H * K, tl.int64) * stride_conv_dim
        conv_k_ptr = conv_ptr + wide
        conv_v_ptr = conv_k_ptr + wide
        stride_x_row_k = stride_x_row
        stride_x_row_v = stride_x_row
        stride_conv_slot_k = stride_conv_slot
        stride_conv_slot_v = stride_conv_slot
        stride_conv_row_k = stride_conv_row
        stride_conv_row_v = stride_conv_row
    OUTER_K: tl.constexpr = BLOCK_K // INNER_K
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    GROUP: tl.constexpr = HV // H
    n = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    i_k = tl.arange(0, BLOCK_K)
    ok_k = i_k < K
    # not by a reshape, after which Triton does not know what is contiguous
    outer_k = tl.arange(0, OUTER_K) * INNER_K
    outer_k = outer_k[None, :, None] if V_FIRST else outer_k[:, None, None]
    tile_k = outer_k + tl.arange(0, INNER_K)[None, None, :]

    first, length, slot, source, past = step_of(
        n, cu_ptr, indices_ptr, accepted_ptr, N, T, columns, L, stride_indices_row,
        stride_indices_column, W, HAS_ACCEPTED, VARLEN,
    )  # fmt: skip
    if indices_ptr is None:
        has_conv = (slot >= 0) & (slot < conv_slots)
        live = (source >= 0) & (source < slots)
    else:
        has_conv = (slot > 0) & (slot < conv_slots)
        live = (source > 0) & (source < slots)
    readable = tl.minimum(length, TOKENS)
    tokens = tl.where(has_conv | live, readable, 0)
    conv_count = tl.where(has_conv, tokens, 0)

    d_k = h * K + i_k
    x_ptr += first * stride_x_row
    x_k_ptr += first * stride_x_row_k
    x_v_ptr += first * stride_x_row_v
    conv_ptr += slot * stride_conv_slot
    conv_k_ptr += slot * stride_conv_slot_k
    conv_v_ptr += slot * stride_conv_slot_v
    history = tl.where(conv_count > 0, W - 1, 0)
    o_ptr += first * (HV * V)
    for g in range(GROUP):
        hv = h * GROUP + g
        head = hv.to(tl.int64)
        # load what needs no slot
        x_q = rows_at(x_ptr + d_k, stride_x_row, readable, ok_k, TOKENS)
        x_k = rows_at(x_k_ptr + d_k, stride_x_row_k, readable, ok_k, TOKENS)
        head_gate_ptr = gate_ptr + first * stride_gate_row + head * stride_gate_head + i_k
        raw_gate = rows_at(head_gate_ptr, stride_gate_row, readable, ok_k, TOKENS)
        head_beta_ptr = beta_ptr + first * stride_beta_row + head * stride_beta_head
        raw_beta = rows_at(head_beta_ptr, stride_beta_row, readable, True, TOKENS)
        a = gate_rate(A_log_ptr, hv, HAS_A)
        dt_bias = tl.zeros([BLOCK_K], tl.float32)
        if HAS_DT_BIAS:
            dt_bias += tl.load(dt_bias_ptr + hv * K + i_k, mask=ok_k, other=0.0).to(tl.float32)
        bias_q = bias_row(bias_ptr, d_k, ok_k, HAS_BIAS)
        bias_k = bias_row(bias_k_ptr, d_k, ok_k, HAS_BIAS)
        # conv_taps masks channels from its bound on: here the next head's
        taps_q = conv_taps(weight_ptr, d_k, (h + 1) * K, W, BLOCK_W)
        taps_k = conv_taps(weight_k_ptr, d_k, (h + 1) * K, W, BLOCK_W)

        q = ()
        k = ()
        gates = ()
        outputs = ()
        for block in tl.static_range(V_BLOCKS):
            i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
            ok_v = i_v < V
            norm = tl.load(norm_weight_ptr + i_v, mask=ok_v, other=0.0).to(tl.float32)
            head_output_ptr = output_gate_ptr + first * stride_output_row
            head_output_ptr = head_output_ptr + head * stride_output_head + i_v
            output_gate = rows_at(head_output_ptr, stride_output_row, readable, ok_v, TOKENS)
            d_v = hv * V + i_v
            x_v = rows_at(x_v_ptr + d_v, stride_x_row_v, readable, ok_v, TOKENS)
            bias_v = bias_row(bias_v_ptr, d_v, ok_v, HAS_BIAS)
            taps_v = conv_taps(weight_v_ptr, d_v, (hv + 1) * V, W, BLOCK_W)
            # load the history and the state
            rows_v_ptr = conv_v_ptr + d_v.to(tl.int64) * stride_conv_dim
            if block == 0:
                rows_q_ptr = conv_ptr + d_k.to(tl.int64) * stride_conv_dim
                rows_k_ptr = conv_k_ptr + d_k.to(tl.int64) * stride_conv_dim
                past_q = past * stride_conv_row
                past_k = past * stride_conv_row_k
                x_q = rows_at(rows_q_ptr + past_q, stride_conv_row, history, ok_k, W - 1) + x_q
                x_k = rows_at(rows_k_ptr + past_k, stride_conv_row_k, history, ok_k, W - 1) + x_k
            past_v = past * stride_conv_row_v
            x_v = rows_at(rows_v_ptr + past_v, stride_conv_row_v, history, ok_v, W - 1) + x_v

            tile = (
                head * stride_state_head
                + over_v(i_v.to(tl.int64), V_FIRST) * STRIDE_STATE_V
                + tile_k.to(tl.int64) * STRIDE_STATE_K
            )
            ok = over_v(ok_v, V_FIRST) & (tile_k < K)
            S_ptr = state_ptr + source * stride_state_slot + tile
            S = tl.load(S_ptr, mask=ok & (live & (tokens > 0)), other=0.0)
            S = S.to(tl.float32)

            # convolve, gate, update
            if block == 0:
                q = convolved(x_q, conv_count, taps_q, bias_q, W, TOKENS, SILU)
                k = convolved(x_k, conv_count, taps_k, bias_k, W, TOKENS, SILU)
            v = convolved(x_v, conv_count, taps_v, bias_v, W, TOKENS, SILU)
            for i in tl.static_range(TOKENS):
                gates += (norm * tl.sigmoid(output_gate[i].to(tl.float32)),)
                o = tl.zeros([BLOCK_V], tl.float32)
                if i < tokens:
                    S, o = update_state(
                        S, q[i], k[i], v[i], raw_gate[i], raw_beta[i], a, dt_bias, SCALE,
                        LOWER_BOUND, BETA_SCALE, QK_NORM_EPS, OUTER_K, INNER_K, V_FIRST, BOUNDED,
                    )  # fmt: skip
                    if PER_TOKEN:
                        target = tl.load(
                            indices_ptr + n * stride_indices_row + i * stride_indices_column,
                            mask=i < columns,
                            other=0,
                        ).to(tl.int64)
                        kept = live & (target > 0) & (target < slots)
                        target_ptr = state_ptr + target * stride_state_slot + tile
                        tl.store(target_ptr, S.to(state_ptr.dtype.element_ty), mask=ok & kept)
                outputs += (o,)
            if not PER_TOKEN:
                written = live & (tokens > 0)
                tl.store(S_ptr, S.to(state_ptr.dtype.element_ty), mask=ok & written)
            tl.debug_barrier()  # a row is not always written by the thread that read it
            shift_history(rows_v_ptr, stride_conv_row_v, x_v, conv_count, ok_v, W, TOKENS)

        store_normed(o_ptr, hv, outputs, gates, tokens, live, NORM_EPS, HV, V, BLOCK_V, TOKENS)
        clear_rows(o_ptr, hv, tl.where(live, tokens, 0), length, HV, V, BLOCK_V)
        if g == GROUP - 1:
            shift_history(rows_q_ptr, stride_conv_row, x_q, conv_count, ok_k, W, TOKENS)
            shift_history(rows_k_ptr, stride_conv_row_k, x_k, conv_count, ok_k, W, TOKENS)


def tile_of(V: int, K: int, state: Tensor, layout: str, N: Any, tokens: int) -> dict[str, int]:
    """The tile of the state that a program holds in registers, and its warps.

    INNER_K elements, LINE bytes, are contiguous across a warp's lanes; the rest of a row of the
    state is in a thread's registers. For that the remaining lanes must go to V: among axes of equal
    contiguity, Triton assigns them to the first up to 3.6, to the last from 3.7 on. With the lanes
    on K a step has 727 shuffles instead of 73.
    """
    key = {"K": K, "V": V, "state": state.dtype, "layout": layout}
    few = isinstance(N, int) and N <= FEW
    chosen = choose("kda_decode", state.device, **key, several=tokens > 1, few=few)
    block_k = triton.next_power_of_2(K)
    block_v = min(triton.next_power_of_2(V), chosen["TILE"] // block_k)
    return {
        "BLOCK_V": block_v,
        "INNER_K": min(block_k, chosen["LINE"] // state.element_size()),
        "V_FIRST": TRITON < (3, 7),
        "num_warps": min(max(block_v * block_k // 2048, 1), chosen["num_warps"]),
    }


def launch_kda_decode(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *step: Any
) -> Tensor:
    return _launch((x,), (conv_state,), (weight,), (bias,), *step)


def launch_kda_decode_unpacked(*args: Any) -> Tensor:
    """Takes inputs, convolution states, weights and biases, each of q, k and v, then the step."""
    return _launch(args[0:3], args[3:6], args[6:9], args[9:12], *args[12:])


def _launch(
    xs: tuple[Tensor, ...], conv_states: tuple[Tensor, ...], weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...], activation: str | None, raw_gate: Tensor, raw_beta: Tensor,
    output_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    beta_scale: float, norm_weight: Tensor, norm_eps: float, qk_norm_eps: float, scale: float,
    state: Tensor, state_indices: Tensor | None, num_accepted: Tensor | None,
    cu_seqlens: Tensor | None, state_layout: str, layout: str,
) -> Tensor:  # fmt: skip
    """Takes one packed tensor of each for the convolution, or three, for q, k and v."""
    HV, K, V = int(raw_gate.shape[-2]), int(raw_gate.shape[-1]), int(output_gate.shape[-1])
    W = int(weights[0].shape[1])
    H = (sum(int(weight.shape[0]) for weight in weights) - HV * V) // (2 * K)
    x, conv_state = xs[0], conv_states[0]
    T = x.shape[0]
    N = T if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty((1, T, HV, V), dtype=x.dtype, device=x.device)
    xs = tuple(x if x.stride(1) == 1 else x.contiguous() for x in xs)
    raw_gate, output_gate = (flat_rows(y, T) for y in (raw_gate, output_gate))
    raw_beta = raw_beta.reshape(T, HV)
    slot_strides, row_strides, (stride_dim, *_) = zip(
        *(conv_state_strides(conv_state, layout) for conv_state in conv_states), strict=True
    )
    L = conv_state.shape[1 if layout == "SD" else 2]
    varlen = cu_seqlens is not None
    per_token, columns, *table_strides = slot_table(state_indices)
    *page_strides, stride_v, stride_k = state_strides(state, state_layout=state_layout)
    tokens = int(L) - W + 2 if varlen else 1
    # without cu_seqlens an empty batch still launches: CUDA has no empty grid
    sequences = N + 1 if varlen else torch.sym_max(N, 1)
    traceable(kda_decode_kernel)[(sequences * H,)](
        *three(xs, None), *three(conv_states, None),
        *three([weight.contiguous() for weight in weights], None),
        *three([contiguous(bias) for bias in biases], None), raw_gate, raw_beta, output_gate,
        contiguous(A_log), contiguous(dt_bias), norm_weight.contiguous(), state, state_indices,
        contiguous(num_accepted), contiguous(cu_seqlens), o,
        N, T, conv_state.shape[0], state.shape[0], columns, L,
        *three([x.stride(0) for x in xs], 0), *three(slot_strides, 0), *three(row_strides, 0),
        stride_dim, *raw_gate.stride()[:2], *raw_beta.stride(), *output_gate.stride()[:2],
        *page_strides, *table_strides,
        SCALE=scale, LOWER_BOUND=0.0 if lower_bound is None else lower_bound, BETA_SCALE=beta_scale,
        NORM_EPS=norm_eps, QK_NORM_EPS=qk_norm_eps, STRIDE_STATE_V=int(stride_v),
        STRIDE_STATE_K=int(stride_k), H=H, HV=HV, K=K, V=V, W=W, TOKENS=tokens,
        BLOCK_K=triton.next_power_of_2(K), BLOCK_W=triton.next_power_of_2(W), UNPACKED=len(xs) == 3,
        SILU=activation == "silu", HAS_BIAS=biases[0] is not None, HAS_A=A_log is not None,
        HAS_DT_BIAS=dt_bias is not None, BOUNDED=lower_bound is not None, PER_TOKEN=per_token,
        HAS_ACCEPTED=num_accepted is not None, VARLEN=varlen,
        **tile_of(V, K, state, layout, N, tokens),
    )  # fmt: skip
    return o
