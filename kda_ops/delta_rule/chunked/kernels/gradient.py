"""The gradient of chunked KDA in four kernels: `prepare` recomputes the scans' inputs of each
chunk, one scan runs forward and one backward over the sequences, and the rest is computed chunk by
chunk. The first two may have run already, as the forward. A small kernel computes sums over value
heads that share a key head, and sums over tokens for the gate's parameters.

No atomics: every sum has a fixed order, so results are bitwise reproducible.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kda_ops._launch import contiguous, is_nvidia, traceable
from kda_ops.delta_rule.chunked.gradient_workspace import (
    Boundaries,
    Saved,
    forward_stages,
    gradient_row,
    gradient_slabs,
    make_gradient_workspace,
    make_rows,
    reverse_stages,
    saved_row,
)
from kda_ops.delta_rule.chunked.kernels.gradient_chunk import (
    chunk_gradient_kernel,
)
from kda_ops.delta_rule.chunked.kernels.gradient_keys import backward_keys_kernel
from kda_ops.delta_rule.chunked.kernels.gradient_prepare import backward_prepare_kernel
from kda_ops.delta_rule.chunked.kernels.gradient_scan import (
    MATRICES,
    states_backward_kernel,
    states_forward_kernel,
)
from kda_ops.delta_rule.chunked.kernels.gradient_tiles import backward_tiles_kernel
from kda_ops.delta_rule.chunked.kernels.scan_segments import count_segments
from kda_ops.delta_rule.chunked.states import Raw
from kda_ops.delta_rule.chunked.workspace import (
    Batch,
    at_least_one,
    dense_rows,
    programs_key,
    token_strides,
)
from kda_ops.delta_rule.state_layout import state_strides
from kda_ops.tuning import choose

# See `count_segments`; all segments run in the second launch. Of two the first launch takes as long
# as half of the scan.
FORMS = ((32, 3, 8),)


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


class BetaParts(NamedTuple):
    """Where the parts of beta's gradient are: one and then one per block of key columns."""

    rows: Tensor
    parts: Tensor
    blocks: int
    gated: bool
    scale: float


def finish_keys(
    q: Tensor, k: Tensor, by_head: dict[str, Tensor | None], found: dict[str, Tensor | None],
    part: Batch, HV: Any, eps: float | None, sums: Tensor | None, beta: BetaParts | None = None,
) -> None:  # fmt: skip
    """The gradients of q and k from those of the value heads, with `eps` through their norm, beta's
    from its parts, and those of A_log and dt_bias from the chunks' `sums`.
    """
    H, K = q.shape[2:]
    done = eps is None and all(by_head[name] is found[name] for name in ("q", "k"))
    dq, dk = (None, None) if done else (found["q"], found["k"])
    dbeta = None if beta is None else found["beta"]
    programs = 0
    if not (dq is None and dk is None and dbeta is None):
        programs = part.programs * H
    elif sums is None:
        return
    summed = None, None, None, 0
    if sums is not None:
        summed = sums, found["dt_bias"], found["A_log"], sums.shape[0]
        programs += HV
    rows, parts, blocks = (None, None, 0) if beta is None else beta[:3]
    traceable(backward_keys_kernel)[(programs,)](
        q, k, by_head["q"], by_head["k"], rows, parts, dq, dk, dbeta, *summed, *part.tables,
        *token_strides(q, k),
        EPS=0.0 if eps is None else eps, NORM=eps is not None,
        GATED=beta is not None and beta.gated, BETA_SCALE=1.0 if beta is None else beta.scale,
        H=H, HV=HV, K=K, KP=triton.next_power_of_2(K), BLOCKS=blocks, **part.constants, num_warps=4,
    )  # fmt: skip


class Turn(NamedTuple):
    """A launch of a scan: its only one, or the `first` or second of those in segments."""

    first: bool
    segments: int
    memory: tuple[Tensor | None, Tensor | None]
    programs: Any
    values: Mapping[str, Any]

    def within(self, depth: int) -> dict[str, Any]:
        """The launch's constants, with at most so many chunks in shared memory."""
        stages = min(self.values["STAGES"], depth)
        return {**self.values, "STAGES": stages, "SEGMENTS": self.segments, "FIRST": self.first}


def turns(q: Tensor, v: Tensor, part: Batch, kernel: str) -> list[Turn]:
    """The launches of a scan in one direction."""
    (HV, V), K = v.shape[2:], q.shape[3]
    pairs = HV * at_least_one(part.N)
    count = 1 if part.slab is not None else gradient_segments(K, V, part, v)
    values = choose(kernel, q.device, programs=programs_key(HV * part.N * count))
    whole = Turn(False, count, (None, None), V // values["BV"] * pairs * count, values)
    if count == 1:
        return [whole]
    shape = (at_least_one(part.N), HV, count - 1, K)
    memory = (
        torch.empty((*shape, V), dtype=torch.float32, device=q.device),
        torch.empty((*shape, K), dtype=torch.float16, device=q.device),
    )
    first = choose(f"{kernel}.first", q.device)
    programs = (V + K) // first["BV"] * pairs * (count - 1)
    return [Turn(True, count, memory, programs, first), whole._replace(memory=memory)]


def gradient_segments(K: int, V: int, batch: Batch, v: Tensor) -> int:
    """The number of segments in which the scans process each sequence."""
    return count_segments(K, V, batch, v, FORMS, 0)


class Chunks(NamedTuple):
    """The inputs as the kernels read them, and what they have in common."""

    inputs: Inputs
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    batch: Batch

    @staticmethod
    def of(x: Inputs) -> "Chunks":
        q, k, v, gate, beta = dense_rows(x.q, x.k, x.v, x.gate, x.beta)
        parameters = contiguous(x.raw.A_log), contiguous(x.raw.dt_bias)
        batch = Batch.of(q, x.cu_seqlens, x.chunk_indices)
        return Chunks(x, q, k, v, gate, beta, *parameters, batch)

    def sizes(self, part: Batch) -> dict[str, Any]:
        HV, V = self.v.shape[2:]
        return {"HV": HV, "K": self.q.shape[3], "V": V, **part.constants}

    def gates(self) -> dict[str, Any]:
        """Constants of the kernels that compute gates."""
        x = self.inputs
        constants = {"SCALE": x.scale, "GATED": x.gated, "H": self.q.shape[2], **x.raw.constants}
        return constants | {"PACKED": is_nvidia(self.q.device)}

    def prepare(self, tiles: Tensor, rows: Tensor, o: Tensor | None, part: Batch) -> None:
        q, k, v, gate, beta = self[1:6]
        traceable(backward_prepare_kernel)[(part.programs * v.shape[2],)](
            q, k, v, gate, beta, self.A_log, self.dt_bias, tiles, rows, o, *part.tables,
            *token_strides(q, k, v, gate, beta), **self.gates(), **self.sizes(part),
            **choose("backward_prepare", q.device),
        )  # fmt: skip

    def scan(
        self, saved: Saved, part: Batch, states: Sequence[Tensor | None], keep: bool,
        o: Tensor | None = None, final: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The states before every chunk, and vn; with them the output and final states."""
        K, initial = self.q.shape[3], self.inputs.initial_state
        for turn in turns(self.q, self.v, part, "states_forward"):
            results = (None, None) if turn.first else (o, final)
            depth = forward_stages(K, turn.values["BV"], results[0] is not None, self.q.device)
            traceable(states_forward_kernel)[(turn.programs,)](
                *saved[:2], *turn.memory, saved.states, initial, *states, *results,
                *part.sequences, *state_strides(initial, results[1]), **self.sizes(part),
                KEEP=keep and not turn.first, **turn.within(depth),
            )  # fmt: skip


def launch_saving_forward(inputs: Inputs, o: Tensor, final: Tensor | None) -> Saved:
    """Writes the output and final states; returns what `launch_gradient` then need not compute.
    K and V are 64 or 128, q, k and v in bf16.
    """
    chunks = Chunks.of(inputs)
    row = saved_row(inputs.q.shape[3], inputs.v.shape[3], inputs.q.dtype)
    saved = Saved(**make_rows(chunks.q, chunks.v, [chunks.batch], row))
    chunks.prepare(saved.tiles, saved.rows, o, chunks.batch)
    chunks.scan(saved, chunks.batch, (None, None), True, o, final)
    return saved


def launch_gradient(
    inputs: Inputs, do: Tensor, dfinal: Tensor | None, needs: frozenset[str],
    saved: Saved | None = None, o: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of the arguments in `needs`, from those of the output `o` and of the final
    state. K and V are 64 or 128, q, k and v in bf16.

    The derivative of the norms of q and k is in the chunks' kernels, except where the value heads
    of a key head have to be added up first.
    """
    x, raw = inputs, inputs.raw
    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    chunks = Chunks.of(inputs)
    q, k, v, gate, batch = chunks.q, chunks.k, chunks.v, chunks.gate, chunks.batch
    (do,) = dense_rows(do)
    parts = [batch]
    if saved is None:
        parts = gradient_slabs(batch, q, v, gradient_row(K, V, q.dtype))
    workspace = make_gradient_workspace(q, v, parts, saved)
    read = Saved(*workspace[:3])
    boundaries = Boundaries(parts, HV, K, V, q.device)
    device = q.device
    sizes = chunks.sizes(parts[0])
    pairs = workspace.pairs
    pair_sizes: dict[str, Any] = {**sizes, "PAIRS": pairs.shape[-1]}
    normed = raw.qk_norm_eps is not None and not needs.isdisjoint(("q", "k"))
    pair_sizes["NORMS"] = HV == H and normed
    gates = chunks.gates()
    del gates["EPS"], gates["BETA_SCALE"]

    found = x.make_gradients(needs)
    o = contiguous(o)
    if not pair_sizes["NORMS"] or found["q"] is None:
        o = None
    elif saved is None:  # in the memory of dq, which is written later
        o = found["q"] if K == V else torch.empty_like(found["v"])
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
        shape = (workspace.tiles.shape[0], HV, 2, K)
        sums = torch.empty(shape, dtype=torch.float32, device=device)
    matrices = torch.empty((MATRICES.value, 64, 64), dtype=torch.int16, device=device)

    def backward(part: Batch, gradients: Sequence[Tensor | None]) -> None:
        # the first one clears: some rows have no chunk, such as the one behind whole chunks
        cleared = (None, 0) if sums is None or part is not parts[-1] else (sums, sums.numel())
        for turn in turns(q, v, part, "states_backward"):
            dinitial = None if turn.first else found["initial_state"]
            traceable(states_backward_kernel)[(turn.programs,)](
                *read[:2], *turn.memory, workspace.dstates, do, found["v"], dfinal, dinitial,
                *gradients, matrices, *cleared, *part.sequences, *token_strides(do),
                *state_strides(dfinal), **sizes,
                **turn.within(reverse_stages(K, turn.values["BV"], not turn.first, device)),
            )  # fmt: skip

    def chunk_gradients(part: Batch) -> None:
        chosen = choose("chunk_gradient", device)
        traceable(backward_tiles_kernel)[(part.programs * HV,)](
            v, o, do, found["v"], *read[:2], pairs, workspace.parts, *part.tables,
            *token_strides(v, do), SCALE=x.scale, **pair_sizes, **choose("backward_tiles", device),
        )  # fmt: skip
        traceable(chunk_gradient_kernel)[(part.programs * HV * (K // chosen["BK"]),)](
            q, k, gate, chunks.A_log, chunks.dt_bias, do, found["v"], *read, workspace.dstates,
            pairs, workspace.parts, matrices.view(torch.float16), by_head["q"], by_head["k"],
            found["gate"], sums, *part.tables, *token_strides(q, k, gate, do), **gates,
            **pair_sizes, **chosen,
        )  # fmt: skip
        beta = BetaParts(read.rows, workspace.parts, K // chosen["BK"], x.gated, raw.beta_scale)
        summed = sums if part is parts[0] else None
        eps = None if pair_sizes["NORMS"] else raw.qk_norm_eps
        finish_keys(q, k, by_head, found, part, HV, eps, summed, beta)

    # gradients of states depend on no state
    states_alone = needs <= {"initial_state"}
    for i, part in enumerate(parts[:-1]):
        if not states_alone:
            chunks.prepare(*read[:2], None, part)
            chunks.scan(read, part, boundaries.around(i)[0], False)
    for i, part in reversed(list(enumerate(parts))):
        states, gradients = boundaries.around(i)
        if saved is None:
            chunks.prepare(*read[:2], None, part)
            if not states_alone:
                chunks.scan(read, part, states, True, o)
        backward(part, gradients)
        if not states_alone:
            chunk_gradients(part)
    return {name: found[name] for name in needs if found[name] is not None}
