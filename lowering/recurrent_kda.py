"""The recurrence is one hand kernel on the GPU, launched from the generated code, in place."""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.recurrent_kda.op import recurrent_kda_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(recurrent_kda_op)
def lower_recurrent_kda(*args: Any) -> Any:
    if on_gpu(args[0]):
        return inline_launcher(OPERATORS[recurrent_kda_op].launcher, *args)
    return call_operator(*args)
