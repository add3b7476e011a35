"""Constants and Triton functions shared by the kernels of all families."""

import triton
import triton.language as tl

from kda_ops._numerics import RCP_LN2

LOG2E = tl.constexpr(RCP_LN2)
LN2 = tl.constexpr(1 / RCP_LN2)


@triton.jit
def quick_sigmoid(z):
    """The sigmoid as the square of a reciprocal root: a division would check ranges, exp would
    handle subnormal results.
    """
    r = tl.rsqrt(1.0 + tl.exp2(z * -LOG2E))
    return r * r


@triton.jit
def bias_row(bias_ptr, d, ok, HAS_BIAS: tl.constexpr):
    """Elements d of a bias vector in fp32, zeros without one."""
    if HAS_BIAS:
        return tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    else:
        return tl.zeros(d.shape, tl.float32)
