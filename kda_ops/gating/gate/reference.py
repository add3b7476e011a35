"""The KDA gate in eager PyTorch: definition, CPU implementation and, in fp64, the oracle."""

from torch import Tensor

from kda_ops.gating.formulas import gate_nats


def gate_reference(
    raw_gate: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    return gate_nats(raw_gate, A_log, dt_bias, lower_bound).contiguous()
