"""The KDA recurrence token by token, in eager PyTorch: definition, CPU implementation, oracle."""

from torch import Tensor

from kda_ops.delta_rule.formulas import recurrence


def recurrent_kda_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    num_accepted: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    return recurrence(q, k, v, g, beta, state, state_indices, num_accepted, scale, cu_seqlens)
