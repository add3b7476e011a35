"""The convolution update: its kernel on GPUs, its CPU implementation elsewhere."""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.short_conv_update.op import short_conv_update_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(short_conv_update_op)
def lower_short_conv_update(x: Any, *args: Any) -> Any:
    if on_gpu(x):
        return inline_launcher(OPERATORS[short_conv_update_op].launcher, x, *args)
    return call_operator(x, *args)
