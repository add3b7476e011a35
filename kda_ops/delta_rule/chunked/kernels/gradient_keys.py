"""The last gradients: of q and k from those of the value heads, if several share a key head or the
operator normalizes q and k, of beta from its parts, and of A_log and dt_bias from the chunks' sums.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.gradient_prepare import gradient_rows_of
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import parts_of
from kda_ops.delta_rule.chunked.kernels.tiles import clear_padding, slab_rows


@triton.jit
def backward_keys_kernel(
    q_ptr, k_ptr, dq_heads_ptr, dk_heads_ptr, rows_ptr, parts_ptr, dq_ptr, dk_ptr, dbeta_ptr,
    sums_ptr, dbias_ptr, drate_ptr, sum_rows, cu_ptr, chunk_indices_ptr,
    T, N, NC, first_row, rows,
    q_b, q_t, q_h, k_b, k_t, k_h,
    EPS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BETA_SCALE: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCKS: tl.constexpr,
    VARLEN: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """One program works on one chunk of one key head, with `sums` [sum_rows, HV, 2, K] before them
    one on the parameters of each value head. Grid: (HV if there are sums + chunks * H), heads
    fastest.

    It computes dq and dk [B, T, H, K], the sums of those of its value heads, [B, T, HV, K], and
    with NORM the derivative of the norm. With one value head per key head, both may be the same
    memory. And it adds the 1 + BLOCKS parts of beta's gradient [B, T, HV]; with GATED that is the
    one of beta before its sigmoid. Outputs that are None are not computed.
    """
    p = tl.program_id(0).to(tl.int64)
    if sums_ptr is not None:
        if p < HV:
            _sum_parameters(sums_ptr, dbias_ptr, drate_ptr, sum_rows, p, HV, K, KP)
            return
        p -= HV
    h = p % H
    p, b, first, count, row, inside = slab_rows(
        p // H, chunk_indices_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    GROUP: tl.constexpr = HV // H
    if not inside:
        if VARLEN and count == 0:
            if dq_ptr is not None:
                clear_padding(dq_ptr, cu_ptr, p, h, T, N, NC, H, K, KP)
            if dk_ptr is not None:
                clear_padding(dk_ptr, cu_ptr, p, h, T, N, NC, H, K, KP)
            if dbeta_ptr is not None:
                for member in range(0, GROUP):
                    clear_padding(dbeta_ptr, cu_ptr, p, h * GROUP + member, T, N, NC, HV, 1, 1)
        return
    if dq_ptr is not None:
        head = q_ptr + b * q_b + h * q_h + first * q_t
        _sum_heads(
            head, q_t, dq_heads_ptr, dq_ptr, b * T + first, count, h, EPS, NORM, H, HV, K, KP
        )
    if dk_ptr is not None:
        head = k_ptr + b * k_b + h * k_h + first * k_t
        _sum_heads(
            head, k_t, dk_heads_ptr, dk_ptr, b * T + first, count, h, EPS, NORM, H, HV, K, KP
        )
    if dbeta_ptr is not None:
        r = tl.arange(0, 64)
        for member in range(0, GROUP):
            work = row * HV + h * GROUP + member
            _, _, part_ptr, _ = parts_of(parts_ptr, work)
            dbeta = tl.load(part_ptr + r)
            for n in tl.static_range(BLOCKS):
                dbeta += tl.load(part_ptr + (n + 1) * 64 + r)
            if GATED:
                _, beta_ptr, _, _, _ = gradient_rows_of(rows_ptr, work, K)
                beta = tl.load(beta_ptr + r)
                dbeta *= beta * (1.0 - beta * (1.0 / BETA_SCALE))
            to = dbeta_ptr + (b * T + first + r) * HV + h * GROUP + member
            tl.store(to, dbeta.to(dbeta_ptr.dtype.element_ty), mask=r < count)


@triton.jit
def _sum_heads(
    x_ptr, x_t, heads_ptr, dx_ptr, token, count, h,
    EPS: tl.constexpr, NORM: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """16 rows at a time."""
    GROUP: tl.constexpr = HV // H
    d = tl.arange(0, KP)[None, :]
    for r0 in range(0, 64, 16):
        r = (r0 + tl.arange(0, 16))[:, None]
        ok = (r < count) & (d < K)
        at = heads_ptr + (token * HV + h * GROUP) * K + (r * (HV * K) + d)
        dx = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        for member in range(1, GROUP):
            dx += tl.load(at + member * K, mask=ok, other=0.0)
        if NORM:
            x = tl.load(x_ptr + r * x_t + d, mask=ok, other=0.0).to(tl.float32)
            dx = norm_gradient(x, dx, EPS)
        to = dx_ptr + (token * H + h) * K + (r * (H * K) + d)
        tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _sum_parameters(
    sums_ptr, dbias_ptr, drate_ptr, rows, h, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr
):
    """The gradients of dt_bias [HV, K] and A_log [HV] of one head, 32 rows at a time."""
    d = tl.arange(0, KP)
    r = tl.arange(0, 32).to(tl.int64)[:, None]
    at = sums_ptr + (r * HV + h) * (2 * K) + d[None, :]
    by_bias = tl.zeros((32, KP), tl.float32)
    by_rate = tl.zeros((32, KP), tl.float32)
    for first in range(0, rows, 32):
        ok = (first + r < rows) & (d < K)[None, :]
        by_bias += tl.load(at, mask=ok, other=0.0)
        by_rate += tl.load(at + K, mask=ok, other=0.0)
        at += 32 * HV * 2 * K
    if dbias_ptr is not None:
        total = tl.sum(by_bias, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + h * K + d, total, mask=d < K)
    if drate_ptr is not None:
        total = tl.sum(tl.sum(by_rate, 0), 0)
        tl.store(drate_ptr + h, total.to(drate_ptr.dtype.element_ty))


@triton.jit
def norm_gradient(x, dy, EPS: tl.constexpr):
    """The gradient of the rows of x, [rows, K], from that of y = x / sqrt(sum x^2 + EPS)."""
    r = tl.rsqrt(tl.sum(x * x, axis=1) + EPS)[:, None]
    y = x * r
    return r * (dy - y * tl.sum(dy * y, axis=1)[:, None])
