"""The `prepare` of chunked KDA from raw inputs.

For 16-bit inputs with K and V of 64 or 128 it is one kernel. For all others a small kernel writes
the inputs of `chunk_kda`, and the general `prepare` follows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, is_nvidia, traceable
from kda_ops.delta_rule.chunked.kernels.prepare import prepare_chunk
from kda_ops.delta_rule.chunked.kernels.prepare_general import launch_general_prepare
from kda_ops.delta_rule.chunked.kernels.raw_inputs import gate_log2, reciprocal_norm
from kda_ops.delta_rule.chunked.kernels.tiles import chunk_rows, clear_padding, slab_rows
from kda_ops.delta_rule.chunked.states import Raw
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    Prepare,
    Workspace,
    dense_rows,
    has_fast_prepare,
    token_strides,
)
from kda_ops.gating.kernel import gate_rate
from kda_ops.kernel import bias_row, quick_sigmoid
from kda_ops.tuning import choose


@triton.jit
def chunk_gated_prepare_kernel(
    q_ptr, k_ptr, v_ptr, x_ptr, beta_ptr, A_log_ptr, bias_ptr, o_ptr, tiles_ptr, u_ptr, decay_ptr,
    cu_ptr, chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    SCALE: tl.constexpr, BOUND: tl.constexpr, BETA_SCALE: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, SLABS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program prepares one chunk of one value head; K and V are 64 or 128.
    Grid: (chunks * HV), heads fastest.

    The tokens' gates y are rounded to fp16, and every exponent, also G and G_last - G, is a 0/1
    matrix times y, so that no sum over tokens stays in registers. The error is at most 2^-12 of the
    exponent, weighted by its power of two: below 2e-4. The decay over the whole chunk, which the
    state accumulates, is summed in fp32.

    With NORM, q and k are normalized as they are loaded.
    """
    p = tl.program_id(0).to(tl.int64)
    h = p % HV
    p = p // HV
    p, b, first, count, row, inside = slab_rows(
        p, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(o_ptr, cu_ptr, p, h, T, N, NC, HV, V, V)
        return
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    d = tl.arange(0, K)
    ok = r < count
    okd = ok[:, None]
    t = tl.minimum(r, count - 1)
    q_at = (q_ptr + b * q_b + hk * q_h + first * q_t) + (t[:, None] * q_t + d[None, :])
    k_at = (k_ptr + b * k_b + hk * k_h + first * k_t) + (t[:, None] * k_t + d[None, :])
    x_at = (x_ptr + b * x_b + h * x_h + first * x_t) + (t[:, None] * x_t + d[None, :])
    work = row * HV + h

    x = tl.load(x_at)
    k = tl.load(k_at)
    q = tl.load(q_at)
    bias = bias_row(bias_ptr, h * K + d, d < K, HAS_BIAS)
    y = gate_log2(x, gate_rate(A_log_ptr, h, HAS_A), bias, BOUND, True)
    y = tl.where(okd, y, 0.0)
    tl.store(decay_ptr + work * K + d, tl.exp2(tl.sum(y, axis=0)))
    y = y.to(tl.float16)
    beta_row = beta_ptr + b * beta_b + h * beta_h + first * beta_t
    beta = BETA_SCALE * quick_sigmoid(tl.load(beta_row + t * beta_t).to(tl.float32))
    beta = tl.where(ok, beta, 0.0)
    before = tl.load(beta_row + tl.maximum(t - 1, 0) * beta_t).to(tl.float32)
    before = BETA_SCALE * quick_sigmoid(before)

    # a common scale goes into q's norm, unless it leaves fp16's range
    FOLD: tl.constexpr = NORM and SCALE > 0.001 and SCALE < 1000.0
    if NORM:
        # raw values may overflow the fp16 of the levels
        q_norm = reciprocal_norm(q, EPS) * (SCALE if FOLD else 1.0)
        q = (q.to(tl.float32) * q_norm[:, None]).to(tl.float16)
        k = (k.to(tl.float32) * reciprocal_norm(k, EPS)[:, None]).to(tl.float16)
    v_ptr = v_ptr + b * v_b + h * v_h + first * v_t
    # UNPACKED spills less with any lengths here
    prepare_chunk(
        q, k, y, beta, before, v_ptr, v_t, o_ptr, tiles_ptr, u_ptr, work, b * T + first, count, h,
        1.0 if FOLD else SCALE, HV, K, V, True, PACKED,
    )  # fmt: skip


@triton.jit
def chunk_inputs_kernel(
    q_ptr, k_ptr, x_ptr, beta_ptr, A_log_ptr, bias_ptr, qn_ptr, kn_ptr, G_ptr, sigmoid_ptr, cu_ptr,
    chunk_indices_ptr,
    T, N, NC,
    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    BOUND: tl.constexpr, BETA_SCALE: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
    HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program computes the general `prepare`'s inputs for one chunk of one value head: G in
    log2, beta after its sigmoid and normalized keys, all in fp32. Grid: (chunks, HV).

    G is computed in blocks of BLOCK columns. The first value head of a key head writes its keys.
    Padding rows are not written.
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b, first, count, _ = chunk_rows(p, chunk_indices_ptr, cu_ptr, T, N, NC, VARLEN)
    if count == 0:
        return
    r = tl.arange(0, 64)
    ok = r < count
    t = first + r
    row = b * T + t
    a = gate_rate(A_log_ptr, h, HAS_A)
    x_row = x_ptr + b * x_b + h * x_h + t[:, None] * x_t
    for k0 in range(0, K, BLOCK):
        d = k0 + tl.arange(0, BLOCK)
        inside = ok[:, None] & (d < K)[None, :]
        x = tl.load(x_row + d[None, :], mask=inside, other=0.0)
        bias = bias_row(bias_ptr, h * K + d, d < K, HAS_BIAS)
        y = tl.where(inside, gate_log2(x, a, bias, BOUND, False), 0.0)
        at = (row[:, None] * HV + h) * K + d[None, :]
        tl.store(G_ptr + at, tl.cumsum(y, axis=0), mask=inside)
    beta = tl.load(beta_ptr + b * beta_b + h * beta_h + t * beta_t, mask=ok, other=0.0)
    tl.store(sigmoid_ptr + row * HV + h, BETA_SCALE * tl.sigmoid(beta.to(tl.float32)), mask=ok)
    if NORM:
        hk = h // (HV // H)
        d = tl.arange(0, KP)[None, :]
        inside = ok[:, None] & (d < K) & (h % (HV // H) == 0)
        to = (row[:, None] * H + hk) * K + d
        k = tl.load(k_ptr + b * k_b + hk * k_h + t[:, None] * k_t + d, mask=inside, other=0.0)
        kn = k.to(tl.float32) * reciprocal_norm(k, EPS)[:, None]
        tl.store(kn_ptr + to, kn, mask=inside)
        q = tl.load(q_ptr + b * q_b + hk * q_h + t[:, None] * q_t + d, mask=inside, other=0.0)
        qn = q.to(tl.float32) * reciprocal_norm(q, EPS)[:, None]
        tl.store(qn_ptr + to, qn, mask=inside)


def launch_inputs(
    q: Tensor, k: Tensor, raw_gate: Tensor, raw_beta: Tensor, raw: Raw, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of `chunk_kda`: q and k, in fp32 if normalized here, the cumulative gate and beta
    after its sigmoid.
    """
    inputs = q, k, *_ = dense_rows(q, k, raw_gate, raw_beta)
    (B, T, H, K), HV = q.shape, raw_beta.shape[2]

    def make(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    g_cumsum, beta = make(B, T, HV, K), make(B, T, HV)
    if raw.qk_norm_eps is not None:
        q, k = make(B, T, H, K), make(B, T, H, K)
    traceable(chunk_inputs_kernel)[(batch.programs, HV)](
        *inputs, contiguous(raw.A_log), contiguous(raw.dt_bias), q, k, g_cumsum, beta,
        *batch.tables[:5], *token_strides(*inputs), **raw.constants, H=H, HV=HV, K=K,
        VARLEN=batch.cu_seqlens is not None, KP=triton.next_power_of_2(K),
        **choose("chunk_inputs", q.device),
    )  # fmt: skip
    return q, k, g_cumsum, beta


def gated_prepare(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, raw: Raw, scale: float,
    batch: Batch,
) -> Prepare:  # fmt: skip
    """`prepare` of inputs that are `dense_rows`."""
    inputs = q, k, v, raw_gate, raw_beta
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    if has_fast_prepare(q.dtype, K, V):
        A_log, dt_bias = contiguous(raw.A_log), contiguous(raw.dt_bias)

        def prepare(o: Tensor, workspace: Workspace, part: Batch) -> None:
            traceable(chunk_gated_prepare_kernel)[(part.programs * HV,)](
                *inputs, A_log, dt_bias, o, *workspace.prepared, *part.tables,
                *token_strides(*inputs), **raw.constants, SCALE=scale, H=H, HV=HV, K=K, V=V,
                **part.constants, PACKED=is_nvidia(q.device),
                **choose("chunk_gated_prepare", q.device, K=K, V=V, dtype=q.dtype),
            )  # fmt: skip
    else:
        keys_q, keys_k, g_cumsum, beta = launch_inputs(q, k, raw_gate, raw_beta, raw, batch)

        def prepare(o: Tensor, workspace: Workspace, part: Batch) -> None:
            launch_general_prepare(keys_q, keys_k, v, g_cumsum, beta, scale, o, workspace, part)

    return prepare
