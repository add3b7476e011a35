"""The gate, beta and the norms of q and k from raw inputs, for the kernels of chunked KDA, and the
derivatives of the gate.
"""

import triton
import triton.language as tl

from kda_ops.gating.kernel import LARGEST, LEAST_GATE, softplus
from kda_ops.kernel import LOG2E, quick_sigmoid


@triton.jit
def within_fp16(y):
    """Gates in log2, at least -30000 to fit fp16: any lower gate decays to zero as well."""
    return tl.where(y < -30000.0, -30000.0, y)


@triton.jit
def quick_softplus(z):
    """`kda_ops.gating.kernel.softplus` with a relative error of 1e-5."""
    return softplus_from(z, tl.exp2(tl.abs(z) * -LOG2E))


@triton.jit
def softplus_from(z, e):
    """`quick_softplus` from e = exp(-|z|): max(z, 0) + e * P(e) with P of degree 5."""
    p = -0.023869140073657036
    p = p * e + 0.10122225433588028
    p = p * e - 0.21004866063594818
    p = p * e + 0.3252066671848297
    p = p * e - 0.4993613660335541
    p = p * e + 0.9999915957450867
    return tl.maximum(z, 0.0) + e * p


@triton.jit
def gate_log2(x, a, bias, BOUND: tl.constexpr, FP16: tl.constexpr):
    """The gate in log2 of a tile x, with one bias per column; BOUND is 0 without a bound.

    With FP16 its relative error is 1e-5 and it fits that type. Without, it is for summing: a decay
    to zero counts as LEAST_GATE, so that the sum keeps small gates next to it.
    """
    z = x.to(tl.float32) + bias[None, :]
    if BOUND != 0.0:
        # z first: a may be a number, and a constexpr times a tensor fails in the interpreter
        r = tl.rsqrt(1.0 + tl.exp2(z * (a * -LOG2E)))
        return (BOUND * LOG2E) * (r * r)
    elif FP16:
        y = (a * -LOG2E) * quick_softplus(z)
        return within_fp16(y)
    else:
        y = (a * -LOG2E) * softplus(z)
        return tl.where(y < LEAST_GATE, LEAST_GATE, y)


@triton.jit
def reciprocal_norm(x, EPS: tl.constexpr):
    """1 / sqrt(sum x^2 + EPS) of the rows of x."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=1) + EPS)


@triton.jit
def gate_slopes(x, a, bias, BOUND: tl.constexpr):
    """The derivatives of a tile's gate in nats by x and by A_log, with one bias per column.

    They are zero for gates below -2^64 and rates above 2^64, as in the reference: their sums over
    tokens could overflow.
    """
    z = x.to(tl.float32) + bias[None, :]
    if BOUND != 0.0:
        s = quick_sigmoid(a * z)
        by_x = tl.where(a < LARGEST, a, 0.0) * (BOUND * (s * (1.0 - s)))
        return by_x, by_x * z
    else:
        # e^-|z|, from which both the softplus and its derivative come
        e = tl.exp2(tl.abs(z) * -LOG2E)
        g = -a * softplus_from(z, e)
        r = tl.rsqrt(1.0 + e)
        s = r * r
        s = tl.where(z < 0.0, e * s, s)
        steep = g < -LARGEST
        return tl.where(steep, 0.0, -a * s), tl.where(steep, 0.0, g)
