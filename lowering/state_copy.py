"""The state copy is one hand kernel on the GPU, launched from the generated code, in place."""

from typing import Any

from kda_ops._define import OPERATORS
from kda_ops.state_copy.op import state_copy_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


@lowers(state_copy_op)
def lower_state_copy(*args: Any) -> Any:
    if on_gpu(args[0]):
        return inline_launcher(OPERATORS[state_copy_op].launcher, *args)
    return call_operator(*args)
