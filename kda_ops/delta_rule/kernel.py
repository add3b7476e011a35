"""Triton functions of the delta rule."""

import triton
import triton.language as tl


@triton.jit
def rounded_product(a, b):
    """The product, rounded by itself, for a sum over what the lanes of a warp hold.

    Where a thread holds one product of the sum, the compiler contracts it with the first addition
    across lanes: lane i then has fma(a_i, b_i, a_j * b_j) and lane j the other way round. They
    differ in the last bit, and which of them is stored is left to a race. An fma is not contracted.
    """
    return tl.fma(a, b, 0.0)
