"""Chunked KDA from raw inputs: on a GPU its kernels become launches of the graph, elsewhere it is a
call of the reference.
"""

from typing import Any

import torch

from kda_ops._define import OPERATORS
from kda_ops.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from lowering.inline import call_operator, inline_launcher, lowers, on_gpu


def _lower(op: Any, *args: Any) -> Any:
    # fp64 has no kernel: the launcher would trace the whole reference
    if on_gpu(args[0]) and args[0].get_dtype() != torch.float64:
        return inline_launcher(OPERATORS[op].launcher, *args)
    return call_operator(*args)


@lowers(chunk_kda_gated_op)
def lower_chunk_kda_gated(*args: Any) -> Any:
    return _lower(chunk_kda_gated_op, *args)


@lowers(chunk_kda_gated_state_op)
def lower_chunk_kda_gated_state(*args: Any) -> Any:
    return _lower(chunk_kda_gated_state_op, *args)
