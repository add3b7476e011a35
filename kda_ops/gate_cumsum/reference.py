"""The cumulative gate in eager PyTorch."""

import torch
from torch import Tensor

from kda_ops.formulas import RCP_LN2, chunk_local_cumsum, gate_nats


def gate_cumsum_reference(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    chunks: Tensor | None,
) -> Tensor:
    if cu_seqlens is not None:
        # or the gradients of A_log and dt_bias would be NaN where padding holds NaN
        token = torch.arange(x.shape[1], device=x.device)[:, None, None]
        x = torch.where(token < cu_seqlens[-1], x, 0)
    g = gate_nats(x, A_log, dt_bias, lower_bound)
    return chunk_local_cumsum(g, chunk_size, cu_seqlens, chunks) * RCP_LN2
