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
def to_fp32(x, PACKED: tl.constexpr):
    """X in fp32; bf16 on NVIDIA GPUs with one instruction per element, where Triton's own
    conversion takes three for two of them.
    """
    if PACKED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, PACKED: tl.constexpr):
    """A tile in fp32, rounded to bf16; on NVIDIA GPUs two elements at a time, where Triton converts
    one by one, in a unit with a quarter of the others' throughput.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; "
            "and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def quick_reciprocal(x, PACKED: tl.constexpr):
    """1 / x for x >= 1, 0 for infinity; on NVIDIA GPUs one instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        r = tl.rsqrt(x)
        return r * r


@triton.jit
def bias_row(bias_ptr, d, ok, HAS_BIAS: tl.constexpr):
    """Elements d of a bias vector in fp32, zeros without one."""
    if HAS_BIAS:
        return tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    else:
        return tl.zeros(d.shape, tl.float32)
