"""Triton functions of the delta rule."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kda_ops.gating.kernel import gate_nats


@triton.jit
def rounded_product(a, b):
    """The product, rounded separately, for a sum across the lanes of a warp.

    If a thread holds one product of the sum, the compiler contracts it with the first addition
    across lanes: lane i then has fma(a_i, b_i, a_j * b_j) and lane j the reverse. They differ in
    the last bit, and a race decides which is stored. An fma is not contracted.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def over_k(x, OUTER_K: tl.constexpr, INNER_K: tl.constexpr, V_FIRST: tl.constexpr):
    """A vector over K, broadcastable to a tile of the state."""
    x = x.reshape(OUTER_K, INNER_K)
    return x[None, :, :] if V_FIRST else x[:, None, :]


@triton.jit
def over_v(x, V_FIRST: tl.constexpr):
    """A vector over V, likewise."""
    return x[:, None, None] if V_FIRST else x[None, :, None]


@triton.jit
def row_sums(S, x, OUTER_K: tl.constexpr, V_FIRST: tl.constexpr):
    """The sums of S x over K; with OUTER_K of 1 a thread may hold one product of a row."""
    products = rounded_product(S, x) if OUTER_K == 1 else S * x
    return tl.sum(tl.sum(products, axis=1 if V_FIRST else 0), axis=1)


@triton.jit
def update_state(
    S, q, k, v, raw_gate, raw_beta, a, dt_bias,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA_SCALE: tl.constexpr,
    QK_NORM_EPS: tl.constexpr, OUTER_K: tl.constexpr, INNER_K: tl.constexpr, V_FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """A tile of the state after one token, and the token's output [BLOCK_V] before its norm."""
    q_norm = tl.rsqrt(tl.sum(rounded_product(q, q), axis=0) + QK_NORM_EPS)
    k_norm = tl.rsqrt(tl.sum(rounded_product(k, k), axis=0) + QK_NORM_EPS)
    q = q * (q_norm * SCALE)
    k = k * k_norm
    kq = tl.sum(rounded_product(k, q), axis=0)
    decay = tl.exp(gate_nats(raw_gate.to(tl.float32) + dt_bias, a, LOWER_BOUND, BOUNDED))
    decay_q = over_k(decay * q, OUTER_K, INNER_K, V_FIRST)
    decay_k = over_k(decay * k, OUTER_K, INNER_K, V_FIRST)
    k = over_k(k, OUTER_K, INNER_K, V_FIRST)
    decay = over_k(decay, OUTER_K, INNER_K, V_FIRST)
    # with S' the decayed state, the output of the new one is S' q + delta (k q)
    seen = row_sums(S, decay_k, OUTER_K, V_FIRST)
    old = row_sums(S, decay_q, OUTER_K, V_FIRST)
    beta = BETA_SCALE * tl.sigmoid(raw_beta.to(tl.float32))
    delta = beta * (v - seen)
    o = old + delta * kq
    return S * decay + over_v(delta, V_FIRST) * k, o


def slot_table(state_indices: Tensor | None) -> tuple[bool, Any, Any, Any]:
    """Of slots `[N]`, `[N, columns]` or None: whether each token has its own, the columns, and the
    strides for sequences and columns.
    """
    if state_indices is None:
        return False, 1, 0, 0
    if state_indices.dim() == 1:
        return False, 1, state_indices.stride(0), 0
    return True, state_indices.shape[1], *state_indices.stride()


def flat_rows(x: Tensor, rows: Any) -> Tensor:
    """`[..., heads, dim]` as `[rows, heads, dim]` with a dense last axis."""
    x = x.reshape(rows, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()
