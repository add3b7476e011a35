"""Triton device functions shared by the kernels of several operators."""

import triton
import triton.language as tl


@triton.jit
def softplus(z):
    """log(1 + exp(z)), exact for z << 0 and linear for z > 20.

    Triton has no log1p of its own. With u = 1 + exp(z), log(u) * exp(z) / (u - 1) is log1p to full fp32 precision (the rounding of u cancels), and where u
    rounds to 1 the result is exp(z) itself.
    """
    e = tl.exp(tl.minimum(z, 20.0))
    u = 1.0 + e
    small = u == 1.0
    d = tl.where(small, 1.0, u - 1.0)
    return tl.where(z > 20.0, z, tl.where(small, e, tl.log(u) * (e / d)))


@triton.jit
def gate_nats(z, a, lower_bound, BOUNDED: tl.constexpr):
    """The gate in nats from z = x + dt_bias and a = exp(A_log)."""
    if BOUNDED:
        return lower_bound * tl.sigmoid(a * z)
    else:
        return -a * softplus(z)
