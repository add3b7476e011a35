"""The launches of the general gradient of chunked KDA."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.gradient_workspace import (
    Boundaries,
    gradient_slabs,
    make_rows,
)
from kda_ops.delta_rule.chunked.kernels.gradient import Inputs, finish_keys
from kda_ops.delta_rule.chunked.kernels.gradient_general import (
    general_backward_kernel,
    general_chunk_kernel,
    general_forward_kernel,
    general_gate_kernel,
    general_prepare_kernel,
)
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    at_least_one,
    dense_rows,
    token_strides,
)
from kda_ops.delta_rule.state_layout import state_strides

BLOCK = 16
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}


def padded(width: int) -> int:
    return max(BLOCK, 1 << (width - 1).bit_length())


def launch_general_gradient(
    inputs: Inputs, used: tuple[Tensor, Tensor, Tensor, Tensor], do: Tensor, dfinal: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:  # fmt: skip
    """Like `kda_ops.delta_rule.chunked.kernels.gradient.launch_gradient`; `used`: the q, k,
    cumulative gate and beta of `chunk_kda`.
    """
    x = inputs
    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    q, k, G, beta, v, do = dense_rows(*used, x.v, do)
    raw_q, raw_k, gate = dense_rows(x.q, x.k, x.gate)
    A_log, dt_bias = contiguous(x.raw.A_log), contiguous(x.raw.dt_bias)
    batch = Batch.of(q, x.cu_seqlens, x.chunk_indices)
    KP, VP = padded(K), padded(V)
    fp32 = torch.float32
    row: dict[str, Any] = {
        "tiles": ((CHUNK * (3 * KP + 2 * VP + 2 * CHUNK),), fp32),
        "rows": ((KP,), fp32),
        "states": ((2, KP, VP), fp32),
    }
    parts = gradient_slabs(batch, q, v, row)
    tiles, decay, states = make_rows(q, v, parts, row).values()
    boundaries = Boundaries(parts, HV, KP, VP, q.device)
    sizes: dict[str, Any] = {"HV": HV, "K": K, "V": V, "KP": KP, "VP": VP, "BLOCK": BLOCK}
    sizes |= parts[0].constants
    found = x.make_gradients(needs)
    by_head: dict[str, Tensor | None] = {
        name: torch.empty((B, T, HV, K), dtype=fp32, device=q.device) for name in ("q", "k")
    }
    dG, dbeta = found["gate"], found["beta"]
    if x.gated or dG is None:
        dG = torch.empty((B, T, HV, K), dtype=fp32, device=q.device)
    if dbeta is None:
        dbeta = torch.empty((B, T, HV), dtype=fp32, device=q.device)
    pairs = HV * at_least_one(batch.N) * (VP // BLOCK)
    initial, dinitial = x.initial_state, found["initial_state"]

    def forward(part: Batch, handed_on: tuple[Tensor | None, ...]) -> None:
        traceable(general_prepare_kernel)[(part.programs, HV)](
            q, k, v, G, beta, tiles, decay, *part.tables, *token_strides(q, k, v, G, beta),
            SCALE=x.scale, H=H, **sizes, **OPTIONS,
        )  # fmt: skip
        traceable(general_forward_kernel)[(pairs,)](
            tiles, decay, states, initial, *handed_on, *part.sequences, *state_strides(initial),
            **sizes, **OPTIONS,
        )  # fmt: skip

    for i, part in enumerate(parts[:-1]):
        forward(part, boundaries.around(i)[0])
    for i, part in reversed(list(enumerate(parts))):
        before, gradients = boundaries.around(i)
        forward(part, before)
        traceable(general_backward_kernel)[(pairs,)](
            tiles, decay, states, do, beta, found["v"], dfinal, dinitial, *gradients,
            *part.sequences, *token_strides(do, beta), *state_strides(dfinal), **sizes, **OPTIONS,
        )  # fmt: skip
        traceable(general_chunk_kernel)[(part.programs, HV)](
            q, k, v, G, beta, do, tiles, states, by_head["q"], by_head["k"], found["v"], dG, dbeta,
            *part.tables, *token_strides(q, k, v, G, beta, do), SCALE=x.scale, GATED=x.gated,
            BETA_SCALE=x.raw.beta_scale, H=H, **sizes, **OPTIONS,
        )  # fmt: skip
    sums = None
    if found["A_log"] is not None or found["dt_bias"] is not None:
        shape = (B * T // CHUNK + batch.N, HV, 2, K)
        sums = torch.zeros(shape, dtype=fp32, device=q.device)
    if x.gated and (found["gate"] is not None or sums is not None):
        dx = torch.empty_like(dG) if found["gate"] is None else found["gate"]
        traceable(general_gate_kernel)[(batch.programs, HV)](
            gate, A_log, dt_bias, dG, dx, sums, *batch.tables[:5], *token_strides(gate),
            BOUND=x.raw.lower_bound or 0.0, HAS_A=A_log is not None, HAS_BIAS=dt_bias is not None,
            HV=HV, K=K, KP=KP, BLOCK=BLOCK, VARLEN=sizes["VARLEN"], **OPTIONS,
        )  # fmt: skip
    finish_keys(raw_q, raw_k, by_head, found, batch, HV, x.raw.qk_norm_eps, sums)
    return {name: y for name in needs if (y := found[name]) is not None}
