"""Triton functions of the gate, and of chunks of a ragged batch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops.gating.formulas import FORGOTTEN, RATES, STEEPEST
from kda_ops.kernel import LOG2E

LEAST_A_LOG, LARGEST_A_LOG = (tl.constexpr(x) for x in RATES[torch.float32])
LARGEST = tl.constexpr(STEEPEST)
LEAST_GATE = tl.constexpr(FORGOTTEN[torch.float32])
LEAST_SUM = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def softplus(z):
    """log(1 + exp(z)), with a small relative error: no flush for z << 0, linear for z > 20.

    With e = exp(-|z|) in [0, 1] it is max(z, 0) + e * P(e), where P is a least-squares fit of
    log1p(e) / e of degree 8. One hardware exp2 and no division: a library log costs more than the
    rest of the gate kernel.
    """
    e = tl.exp2(tl.abs(z) * -LOG2E)
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
    # not a minimum, which would lose NaN
    A_log = tl.where(A_log > LARGEST_A_LOG, LARGEST_A_LOG, A_log)
    A_log = tl.where(A_log < LEAST_A_LOG, LEAST_A_LOG, A_log)
    return tl.exp(A_log)


@triton.jit
def gate_rate(A_log_ptr, h, HAS_A: tl.constexpr):
    """The rate of head h, 1 without A_log."""
    if HAS_A:
        return rate(tl.load(A_log_ptr + h))
    else:
        return 1.0


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

    Empty (end <= start) for an unused row. `0 <= start` and `end <= T` for any table values.
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
    """First padding token (int64), within [0, T] for any values of `cu_seqlens`."""
    last = tl.load(cu_seqlens_ptr + sequences).to(tl.int64)
    return tl.minimum(tl.maximum(last, 0), T)


@triton.jit
def chunk_block(
    cu_seqlens_ptr, chunk_indices_ptr, T, D, rows, sequences, C: tl.constexpr, BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """A program's BLOCK channels, batch entry and chunk: its row, first token and end.

    Grid: (B * rows * channel blocks), channel blocks innermost; `rows` are chunks per batch entry,
    or rows of the chunk table.
    """
    blocks = tl.cdiv(D, BLOCK)
    pid = tl.program_id(0)
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = pid // blocks
    batch = (row // rows).to(tl.int64)
    row = (row % rows).to(tl.int64)
    if VARLEN:
        start, end = chunk_span(cu_seqlens_ptr, chunk_indices_ptr, row, sequences, T, C)
    else:
        start = row * C
        end = tl.minimum(start + C, T)
    return d, batch, row, start, end


@triton.jit
def running_sums(
    x_ptr, out_ptr, d, start, end, stride_token, D, factor, a, bias, C: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, GATED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Running sums of the BLOCK channels d of one chunk, times factor: of x or, if GATED, of the
    token-dependent part of a gate, with the rate a. Sums that overflow become the least finite
    number: infinite sums have no difference.

    It walks down the tokens with the running sums in registers, without communication between
    threads. STEP tokens are loaded at once, summed separately and added to the sum so far: that
    many loads are in flight, and the rounding error is that of STEP + C / STEP terms, not of C.
    """
    before = tl.zeros([BLOCK], tl.float32)
    for first in range(0, C, STEP):
        tokens = ()
        for i in tl.static_range(STEP):
            t = start + first + i
            ok = (d < D) & (t < end)
            tokens = tokens + (tl.load(x_ptr + t * stride_token, mask=ok, other=0.0),)  # noqa: RUF005
        sums = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(STEP):
            t = start + first + i
            x = tokens[i].to(tl.float32)
            if GATED:
                z = x + bias
                sums += tl.sigmoid(a * z) if BOUNDED else softplus(z)
                total = sums * factor + before
                if not BOUNDED:
                    total = tl.maximum(total, LEAST_SUM, propagate_nan=tl.PropagateNan.ALL)
            else:
                sums += x
                total = (before + sums) * factor
            tl.store(out_ptr + t * D, total, mask=(d < D) & (t < end))
        before += sums * factor if GATED else sums


@triton.jit
def clear_block(
    out_ptr, cu_seqlens_ptr, d, row, sequences, T, D, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program row n zeroes the n-th C tokens past the last sequence."""
    padding = padding_start(cu_seqlens_ptr, sequences, T) + row * C
    for t in range(padding, tl.minimum(padding + C, T)):
        tl.store(out_ptr + t * D, tl.zeros([BLOCK], tl.float32), mask=d < D)


def gate_constants(
    A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> dict[str, Any]:
    return {
        "LOWER_BOUND": 0.0 if lower_bound is None else lower_bound,
        "HAS_A": A_log is not None,
        "HAS_BIAS": dt_bias is not None,
        "BOUNDED": lower_bound is not None,
    }
