"""The short convolution of whole sequences: its kernel on GPUs, its CPU implementation elsewhere.

As IR its taps are W shifted reads of x, which Inductor turns into twice the time of the kernel that
keeps a sliding window in registers.
"""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.short_conv.op import short_conv_op, short_conv_state_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(short_conv_op)
def lower_short_conv(x: Any, *args: Any) -> Any:
    if on_gpu(x):
        return inline_launcher(OPERATORS[short_conv_op].launcher, x, *args)
    return call_operator(x, *args)


@lowers(short_conv_state_op)
def lower_short_conv_state(x: Any, *args: Any) -> Any:
    if on_gpu(x):
        return inline_launcher(OPERATORS[short_conv_state_op].launcher, x, *args)
    return call_operator(x, *args)
