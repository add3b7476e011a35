"""The whole decode step is one hand kernel on the GPU, launched from the generated code."""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.kda_decode.op import kda_decode_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(kda_decode_op)
def lower_kda_decode(*args: Any) -> Any:
    if on_gpu(args[0]):
        return inline_launcher(OPERATORS[kda_decode_op].launcher, *args)
    return call_operator(*args)
