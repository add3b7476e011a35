"""The KDA gate in eager PyTorch:

the definition, the CPU implementation and, from fp64 inputs, the oracle.
"""

from torch import Tensor

from kda_ops.formulas import gate_nats


def gate_reference(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    return gate_nats(x, A_log, dt_bias, lower_bound).contiguous()
