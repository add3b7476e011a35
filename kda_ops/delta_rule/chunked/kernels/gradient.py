"""The gradient of chunked KDA in four kernels: `prepare` recomputes the scans' inputs of each
chunk, one scan runs forward and one backward over the sequences, and the rest is computed chunk by
chunk. Three small kernels compute 0/1 matrices, sums over value heads that share a key head, and
sums over tokens for the gate's parameters.

No atomics: every sum has a fixed order, so results are bitwise reproducible.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.delta_rule.chunked.gradient_workspace import (
    forward_stages,
    gradient_row,
    gradient_slabs,
    make_gradient_workspace,
    reverse_stages,
)
from kda_ops.delta_rule.chunked.kernels.gradient_chunk import (
    MATRICES,
    chunk_gradient_kernel,
    level_matrices_kernel,
)
from kda_ops.delta_rule.chunked.kernels.gradient_keys import backward_keys_kernel
from kda_ops.delta_rule.chunked.kernels.gradient_prepare import backward_prepare_kernel
from kda_ops.delta_rule.chunked.kernels.gradient_scan import (
    states_backward_kernel,
    states_forward_kernel,
)
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import (
    backward_beta_kernel,
    backward_tiles_kernel,
)
from kda_ops.delta_rule.chunked.kernels.prepare import is_nvidia
from kda_ops.delta_rule.chunked.states import Raw
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    at_least_one,
    dense_rows,
    token_strides,
)
from kda_ops.delta_rule.state_layout import state_strides
from kda_ops.tuning import choose


class Inputs(NamedTuple):
    """Arguments of the forward; unless `gated`, the gate is cumulative and in log2, and beta is
    after its sigmoid.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    raw: Raw
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    chunk_indices: Tensor | None
    gated: bool

    def make_gradients(self, needs: frozenset[str]) -> dict[str, Tensor | None]:
        """Empty gradients of the arguments in `needs`, None for the others; v's always, since other
        kernels read it.
        """
        inputs = {name: getattr(self, name) for name in ("q", "k", "v", "gate", "beta")}
        inputs |= {"A_log": self.raw.A_log, "dt_bias": self.raw.dt_bias}
        inputs |= {"initial_state": self.initial_state}

        def make(name: str, like: Tensor | None) -> Tensor | None:
            if like is None or not (name in needs or name == "v"):
                return None
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)

        return {name: make(name, like) for name, like in inputs.items()}


@triton.jit
def parameter_sums_kernel(
    sums_ptr, bias_ptr, rate_ptr, rows, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr
):
    """The gradients of dt_bias [HV, K] and A_log [HV] from the chunks' sums [rows, HV, 2, K]. One
    program per head.
    """
    h = tl.program_id(0)
    d = tl.arange(0, KP)[None, :]
    r = tl.arange(0, 32).to(tl.int64)[:, None]
    at = sums_ptr + (r * HV + h) * (2 * K) + d
    by_bias = tl.zeros((32, KP), tl.float32)
    by_rate = tl.zeros((32, KP), tl.float32)
    for first in range(0, rows, 32):
        ok = (first + r < rows) & (d < K)
        by_bias += tl.load(at, mask=ok, other=0.0)
        by_rate += tl.load(at + K, mask=ok, other=0.0)
        at += 32 * HV * 2 * K
    if bias_ptr is not None:
        to = bias_ptr + h * K + tl.arange(0, KP)
        total = tl.sum(by_bias, 0).to(bias_ptr.dtype.element_ty)
        tl.store(to, total, mask=tl.arange(0, KP) < K)
    if rate_ptr is not None:
        total = tl.sum(tl.sum(by_rate, 0), 0)
        tl.store(rate_ptr + h, total.to(rate_ptr.dtype.element_ty))


def sum_parameters(sums: Tensor | None, found: dict[str, Tensor | None]) -> None:
    """The gradients of A_log and dt_bias from the chunks' sums [rows, HV, 2, K]."""
    if sums is None:
        return
    rows, HV, _, K = sums.shape
    traceable(parameter_sums_kernel)[(HV,)](
        sums, found["dt_bias"], found["A_log"], rows,
        HV=HV, K=K, KP=triton.next_power_of_2(K), num_warps=8,
    )  # fmt: skip


def sum_heads(
    q: Tensor, k: Tensor, by_head: dict[str, Tensor | None], found: dict[str, Tensor | None],
    batch: Batch, eps: float | None,
) -> None:  # fmt: skip
    """The gradients of q and k from those of the value heads, with `eps` through their norm."""
    if found["q"] is None and found["k"] is None:
        return
    H, K = q.shape[2:]
    heads = by_head["q"] if by_head["k"] is None else by_head["k"]
    assert heads is not None
    traceable(backward_keys_kernel)[(batch.programs * H,)](
        q, k, by_head["q"], by_head["k"], found["q"], found["k"], *batch.tables[:5],
        *token_strides(q, k),
        EPS=0.0 if eps is None else eps, NORM=eps is not None, H=H, HV=heads.shape[2], K=K,
        KP=triton.next_power_of_2(K), VARLEN=batch.cu_seqlens is not None, num_warps=4,
    )  # fmt: skip


def has_fast_gradient(dtype: torch.dtype, K: Any, V: Any) -> bool:
    """Whether `launch_gradient` supports it; else the general form does."""
    return dtype == torch.bfloat16 and K in (64, 128) and V in (64, 128)


def launch_gradient(
    inputs: Inputs, do: Tensor, dfinal: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of the arguments in `needs`, from those of the output and of the final state.
    K and V are 64 or 128, q, k and v in bf16.
    """
    x, raw = inputs, inputs.raw
    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    q, k, v, gate, beta, do = dense_rows(x.q, x.k, x.v, x.gate, x.beta, do)
    A_log, dt_bias = contiguous(raw.A_log), contiguous(raw.dt_bias)
    batch = Batch.of(q, x.cu_seqlens, x.chunk_indices)
    row = gradient_row(K, V, q.dtype)
    parts = gradient_slabs(batch, q, v, row)
    workspace = make_gradient_workspace(q, v, parts, row)
    device = q.device
    sizes: dict[str, Any] = {"HV": HV, "K": K, "V": V, **parts[0].constants}
    gates: dict[str, Any] = {
        "SCALE": x.scale,
        "GATED": x.gated,
        "H": H,
        "PACKED": is_nvidia(device),
    }
    gates |= raw.constants
    # of the first kernel alone
    first = {name: gates.pop(name) for name in ("EPS", "BETA_SCALE")}

    found = x.make_gradients(needs)
    # in place where there is nothing to add
    by_head = {name: found[name] for name in ("q", "k")}
    if HV != H:
        shape = (B, T, HV, K)
        by_head = {
            name: None if y is None else torch.empty(shape, dtype=torch.float32, device=device)
            for name, y in by_head.items()
        }
    sums = None
    if found["A_log"] is not None or found["dt_bias"] is not None:
        # a table of chunks may have fewer than its rows, a slab fewer than others
        whole = x.cu_seqlens is None and len(parts) == 1 and isinstance(T, int) and T > 0
        make, rows = (
            (torch.empty, batch.programs) if whole else (torch.zeros, workspace.tiles.shape[0])
        )
        sums = make((rows, HV, 2, K), dtype=torch.float32, device=device)
    matrices = torch.empty((MATRICES, 64, 64), dtype=torch.int16, device=device)
    traceable(level_matrices_kernel)[(MATRICES,)](matrices, num_warps=4)
    pairs = workspace.tiles.view(torch.float16)

    def prepare(part: Batch) -> None:
        traceable(backward_prepare_kernel)[(part.programs * HV,)](
            q, k, v, gate, beta, A_log, dt_bias, workspace.tiles, workspace.rows, *part.tables,
            *token_strides(q, k, v, gate, beta), **first, **gates, **sizes,
            **choose("backward_prepare", device),
        )  # fmt: skip

    programs = HV * at_least_one(batch.N)

    def forward(part: Batch, states: Sequence[Tensor | None], keep: bool) -> None:
        chosen = dict(choose("states_forward", device))
        chosen["STAGES"] = min(chosen["STAGES"], forward_stages(K, chosen["BV"], device))
        traceable(states_forward_kernel)[(V // chosen["BV"] * programs,)](
            *workspace.chunks, x.initial_state, *states, *part.sequences,
            *state_strides(x.initial_state), **sizes, KEEP=keep, **chosen,
        )  # fmt: skip

    def backward(part: Batch, gradients: Sequence[Tensor | None]) -> None:
        chosen = dict(choose("states_backward", device))
        chosen["STAGES"] = min(chosen["STAGES"], reverse_stages(K, chosen["BV"], device))
        traceable(states_backward_kernel)[(V // chosen["BV"] * programs,)](
            *workspace.chunks, do, found["v"], dfinal, found["initial_state"], *gradients,
            *part.sequences, *token_strides(do), *state_strides(dfinal), **sizes, **chosen,
        )  # fmt: skip

    def chunk_gradients(part: Batch) -> None:
        chosen = choose("chunk_gradient", device)
        traceable(backward_tiles_kernel)[(part.programs * HV,)](
            v, do, found["v"], workspace.tiles, pairs, workspace.rows, *part.tables,
            *token_strides(v, do), SCALE=x.scale, **sizes, **choose("backward_tiles", device),
        )  # fmt: skip
        traceable(chunk_gradient_kernel)[(part.programs * HV * (K // chosen["BK"]),)](
            q, k, gate, A_log, dt_bias, do, found["v"], workspace.tiles, pairs, workspace.rows,
            workspace.states, matrices.view(torch.float16), by_head["q"], by_head["k"],
            found["gate"], sums, *part.tables, *token_strides(q, k, gate, do), **gates, **sizes,
            **chosen,
        )  # fmt: skip
        if found["beta"] is not None:
            traceable(backward_beta_kernel)[(part.programs * HV,)](
                workspace.rows, found["beta"], *part.tables,
                GATED=x.gated, BETA_SCALE=raw.beta_scale, HV=HV, K=K, BK=chosen["BK"],
                **part.constants, num_warps=1,
            )  # fmt: skip

    # gradients of states depend on no state
    states_alone = needs <= {"initial_state"}
    for i, part in enumerate(parts[:-1]):
        if not states_alone:
            prepare(part)
            forward(part, workspace.handed_on(i)[0], False)
    for i, part in reversed(list(enumerate(parts))):
        states, gradients = workspace.handed_on(i)
        prepare(part)
        if not states_alone:
            forward(part, states, True)
        backward(part, gradients)
        if not states_alone:
            chunk_gradients(part)
    if HV != H or raw.qk_norm_eps is not None:
        sum_heads(q, k, by_head, found, batch, raw.qk_norm_eps)
    sum_parameters(sums, found)
    return {name: found[name] for name in needs if found[name] is not None}
