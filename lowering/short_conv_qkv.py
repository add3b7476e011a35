"""The short convolution of q, k and v with the norms of q and k: its kernel on GPUs, its CPU
implementation elsewhere.
"""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.short_conv_qkv.op import short_conv_qkv_op, short_conv_qkv_state_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(short_conv_qkv_op)
def lower_short_conv_qkv(x: Any, *args: Any) -> Any:
    if on_gpu(x):
        return inline_launcher(OPERATORS[short_conv_qkv_op].launcher, x, *args)
    return call_operator(x, *args)


@lowers(short_conv_qkv_state_op)
def lower_short_conv_qkv_state(x: Any, *args: Any) -> Any:
    if on_gpu(x):
        return inline_launcher(OPERATORS[short_conv_qkv_state_op].launcher, x, *args)
    return call_operator(x, *args)
