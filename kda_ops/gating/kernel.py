"""Triton functions of the gate, and of chunks of a ragged batch."""

import triton
import triton.language as tl


@triton.jit
def softplus(z):
    """log(1 + exp(z)), right relative to the result: no flush for z << 0, linear for z > 20.

    With e = exp(-|z|) in [0, 1] it is max(z, 0) + e * P(e), where P is a least-squares fit of
    log1p(e) / e of degree 8. One hardware exp2 and no division: a library log costs more than the
    rest of a gate kernel.
    """
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    p = 0.0051058256067335606
    p = p * e - 0.028991956263780594
    p = p * e + 0.07738073915243149
    p = p * e - 0.13590599596500397
    p = p * e + 0.1907130926847458
    p = p * e - 0.2483394593000412
    p = p * e + 0.3331793546676636
    p = p * e - 0.4999943673610687
    p = p * e + 0.9999999403953552
    return tl.maximum(z, 0.0) + e * p


@triton.jit
def rate(A_log):
    """exp(A_log), neither 0 nor infinite: see `kda_ops.gating.formulas.RATES`."""
    A_log = A_log.to(tl.float32)
    A_log = tl.where(A_log > 88.0, 88.0, A_log)  # not a minimum, which would lose NaN
    A_log = tl.where(A_log < -87.0, -87.0, A_log)
    return tl.exp(A_log)


@triton.jit
def gate_nats(z, a, lower_bound, BOUNDED: tl.constexpr):
    """The gate in nats from z = x + dt_bias and the rate a."""
    if BOUNDED:
        return lower_bound * tl.sigmoid(a * z)
    else:
        return -a * softplus(z)


@triton.jit
def chunk_span(cu_seqlens_ptr, chunk_indices_ptr, row, sequences, T, C: tl.constexpr):
    """First token (int64) of row `row` of a chunk table, and one past the last.

    Empty (end <= start) for an unused row. `0 <= start` and `end <= T` whatever the tables hold.
    """
    n = tl.load(chunk_indices_ptr + row * 2)
    c = tl.load(chunk_indices_ptr + row * 2 + 1)
    real = (n >= 0) & (n < sequences) & (c >= 0)
    n = tl.where(real, n, 0)
    first = tl.load(cu_seqlens_ptr + n).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    start = tl.maximum(first, 0) + tl.where(real, c, 0).to(tl.int64) * C
    end = tl.minimum(tl.minimum(start + C, last), T)
    return start, tl.where(real, end, start)


@triton.jit
def padding_start(cu_seqlens_ptr, sequences, T):
    """First token (int64) of no sequence, within [0, T] whatever `cu_seqlens` holds."""
    last = tl.load(cu_seqlens_ptr + sequences).to(tl.int64)
    return tl.minimum(tl.maximum(last, 0), T)
