"""Arguments and results of both chunked operators: states, and the parameters that turn raw inputs
into the gate, beta and keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.blocks import Blocks


class States(NamedTuple):
    """Initial and final states; or `paged`, in `final` pages for both, with the page of each
    sequence, None for that of its number, which of them have an initial state, and the pages of
    their blocks.
    """

    initial: Tensor | None
    final: Tensor | None
    indices: Tensor | None = None
    has_initial: Tensor | None = None
    paged: bool = False
    state_layout: str = "VK"
    blocks: Blocks | None = None


class Raw(NamedTuple):
    """Parameters of the gate, of beta before its sigmoid and of the norms of q and k."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    beta_scale: float
    qk_norm_eps: float | None

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of the kernels for raw inputs."""
        return {
            "BOUND": self.lower_bound or 0.0,
            "BETA_SCALE": self.beta_scale,
            "EPS": self.qk_norm_eps or 0.0,
            "NORM": self.qk_norm_eps is not None,
            "HAS_A": self.A_log is not None,
            "HAS_BIAS": self.dt_bias is not None,
        }


NOT_RAW = Raw(None, None, None, 1.0, None)


def empty_final_state(
    q: Tensor, v: Tensor, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[N, HV, V, K]`, uninitialized; empty unless requested."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], v.shape[3], q.shape[3]) if output_final_state else (0,)
    dtype = accumulation_dtype(q) if initial_state is None else initial_state.dtype
    return torch.empty(shape, dtype=dtype, device=v.device)


def chunked_fake(
    q: Tensor, v: Tensor, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return o, empty_final_state(q, v, initial_state, output_final_state, cu_seqlens)


def chunked_state_fake(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def identity_states(
    N: Any, HV: int, K: int, entered: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`[N, HV, K, K]`: states of K rows to start from, the identity where a state is `entered`."""
    identity = torch.eye(K, dtype=dtype, device=device)
    if entered is not None:
        identity = torch.where(entered[:, None, None, None], identity, 0)
    return identity.expand(N, HV, K, K).contiguous()


def chunked_affine_fake(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (HV, V), K = v.shape[2:], q.shape[3]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = (torch.empty((*v.shape[:3], width), dtype=v.dtype, device=v.device) for width in (V, K))
    states = (
        torch.empty((N, HV, height, K), dtype=accumulation_dtype(q), device=v.device)
        for height in (V, K)
    )
    return *rows, *states
