"""The recurrence over the ranks of a context, as affine functions.

A part of the tokens maps the state S `[V, K]` before it to `S A + b` (A `[K, K]`, b `[V, K]`), and
its output is `o + S reads`: one pass, of `chunk_kda_gated_affine`, makes all of it before S is
known. All ranks get the maps of all parts, and each composes those before its own and adds `S
reads` to its output. Backward, a part maps the gradient at its end, D, to `D A^T + c`, with c the
gradient that its own outputs have for its start, `do^T reads`: no pass over the tokens but that of
all other gradients.

Packed sequences need the map of one sequence per part: the one that is there at its end. Where that
one begins in the part, A is 0, and so is what it reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kda_ops._numerics import accumulation_dtype
from kda_ops.nn.context import Packed, Ranks
from kda_ops.varlen import prepare_chunk_indices

STATE, RESULTS = 11, 15  # in the operator's arguments: the initial state, the first behind all


class Constants(NamedTuple):
    """What a call has besides tensors."""

    ranks: Ranks
    namespace: str  # of the operator: the kernels' or the reference's
    lower_bound: float | None
    beta_scale: float
    qk_norm_eps: float | None
    scale: float
    output_final_state: bool


class Sequences(NamedTuple):
    """The sequences of a rank's parts, and where their states come from and go.

    `[S, ...]` below are states of the operator's sequences: of a dense batch, those of its B rows,
    the m parts of a row one after another; of a packed one, N for each of the m parts.
    `[m, R, ...]` are states at an end of each part, R = B of them, or one.
    """

    own: Tensor
    parts: int
    packed: Packed | None

    @property
    def offsets(self) -> Tensor | None:
        return None if self.packed is None else self.packed.cu_seqlens

    def spread(self, states: Tensor, entering: bool) -> Tensor:
        """`[S, ...]` from the states `[m, R, ...]` at the beginning, or end, of the parts."""
        if self.packed is None:
            return states.transpose(0, 1).flatten(0, 1)
        return masked(states, self.packed.enters if entering else self.packed.leaves).flatten(0, 1)

    def entering(self, states: Tensor) -> Tensor:
        """The states `[m, R, ...]` of what enters each part, from those of all sequences."""
        if self.packed is None:
            return states.unflatten(0, (-1, len(self.own))).transpose(0, 1)
        states = states.unflatten(0, (len(self.own), -1))
        return masked(states, self.packed.enters).sum(1, keepdim=True)

    def at_last(self, states: Tensor) -> Tensor:
        """The states `[m, R, ...]` at the ends of the parts, from those of all sequences."""
        if self.packed is None:
            return self.entering(states)
        states = states.unflatten(0, (len(self.own), -1))
        return masked(states, self.packed.last).sum(1, keepdim=True)

    def given(self, states: Tensor, initial: bool) -> Tensor:
        """`[S, ...]` from states of the caller's sequences, on the rank that has the first token of
        a sequence, or for final states the last one; elsewhere zeros.
        """
        mask = self.held(initial)
        if self.packed is None:
            return masked(states[:, None], mask).flatten(0, 1)
        return masked(states[None], mask).flatten(0, 1)

    def returned(self, states: Tensor, initial: bool) -> Tensor:
        """States of the caller's sequences from `[S, ...]`, likewise."""
        mask = self.held(initial)
        if self.packed is None:
            return masked(states.unflatten(0, (-1, len(self.own))), mask).sum(1)
        return masked(states.unflatten(0, (len(self.own), -1)), mask).sum(0)

    def held(self, initial: bool) -> Tensor:
        """Which of the rank's sequences have the first, or last, token of the caller's."""
        if self.packed is None:
            return (self.own == (0 if initial else self.parts - 1))[None]
        return self.packed.begins if initial else self.packed.ends

    def by_part(self, rows: Tensor) -> Tensor:
        """Rows `[B m, T / m, ...]` or packed `[1, T, ...]` as `[R m, T / m, ...]`."""
        if self.packed is None:
            return rows
        return rows.unflatten(1, (len(self.own), rows.shape[1] // len(self.own))).flatten(0, 1)

    def entered_rows(self, rows: Tensor) -> Tensor:
        """`by_part`, with zeros but for the tokens of the sequences that a state enters."""
        rows = self.by_part(rows)
        if self.packed is None:
            return rows
        size = rows.shape[1]
        token = (self.own * size)[:, None] + torch.arange(size, device=rows.device)
        return torch.where((token < self.packed.stop[:, None])[:, :, None, None], rows, 0)


def masked(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None, None, None], states, 0)


def tables(cu_seqlens: Tensor | None, tokens: Any) -> tuple[Tensor | None, Tensor | None]:
    """The last two arguments of the operator."""
    if cu_seqlens is None:
        return None, None
    return cu_seqlens, prepare_chunk_indices(cu_seqlens, tokens)


def operators(namespace: str) -> tuple[Any, Any]:
    """The recurrence as an affine function, and the gradient of `chunk_kda_gated`: of the kernels
    or of the reference.
    """
    ops = getattr(torch.ops, namespace)
    return ops.chunk_kda_gated_affine.default, ops.chunk_kda_gated_backward.default


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of GEMMs of what tokens read: bf16, or what accumulates, as states exceed fp16's range."""
    return x.dtype if x.dtype == torch.bfloat16 else accumulation_dtype(x)


class Scan(Function):
    """`chunk_kda_gated` over the ranks of a context: one all-gather of maps, and backward one of
    gradients.

    A function of its own, since the derivative of composing maps would gather and compose anew what
    backward needs only once, and the gradient of `chunk_kda_gated` is cheaper than that of its
    affine form.
    """

    @staticmethod
    def forward(
        ctx: Any, constants: Constants, q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor,
        raw_beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
        initial_state: Tensor | None, own: Tensor, *packed: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of rows by part, `[B m, T / m, ...]` or packed `[1, T, ...]`: the output, and with
        `output_final_state` the final states `[N, HV, V, K]` of the sequences that end here.
        """
        ranks, namespace, *gate, scale, output_final_state = constants
        op, _ = operators(namespace)
        sequences = Sequences(own, ranks.size * ranks.parts, Packed(*packed) if packed else None)
        acc, K, V = accumulation_dtype(q), q.shape[3], v.shape[3]
        given = entered = None
        if initial_state is not None:
            given = sequences.given(initial_state.to(acc), True)
        if sequences.packed is not None:
            entered = sequences.packed.enters.flatten()
        offsets = tables(sequences.offsets, q.shape[1])
        o, reads, final, transition = op(
            q, k, v, raw_gate, raw_beta, A_log, dt_bias, *gate, scale, given, entered, *offsets
        )  # fmt: skip

        with torch.autocast(v.device.type, enabled=False):
            # the maps of this rank's parts, composed to the states before them
            own_maps = (
                sequences.at_last(transition),
                sequences.at_last(final),
            )  # [m, R, HV, ..., K]
            A, b = ranks.gather(torch.cat(own_maps, -2)).split([K, V], -2)
            S, starts = torch.zeros_like(b[0]), []
            for place in ranks.places():
                starts.append(S)
                S = S @ A[place] + b[place]
            start = torch.stack(starts)[own]

            factors = (sequences.by_part(reads), start.transpose(0, 1).flatten(0, 1))
            factors = tuple(x.to(operand_dtype(q)) for x in factors)
            o = (o + torch.einsum("rthk,rhvk->rthv", *factors).reshape(v.shape)).to(v.dtype)
            if output_final_state:
                final = final + sequences.spread(start, True) @ transition
                final, own_A = sequences.returned(final, False), sequences.entering(transition)
            else:
                final, own_A = final.new_empty(0), None
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, k, v, raw_gate, raw_beta, A_log, dt_bias, initial_state, start, reads, A, own_A, own,
            *packed,
        )  # fmt: skip
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, raw_gate, raw_beta, A_log, dt_bias, initial_state, *saved = ctx.saved_tensors
        start, reads, A, own_A, own, *packed = saved
        ranks, namespace, *gate, scale, output_final_state = ctx.constants
        _, op = operators(namespace)
        sequences = Sequences(own, ranks.size * ranks.parts, Packed(*packed) if packed else None)
        end = None
        if output_final_state and dfinal is not None:
            end = sequences.given(dfinal.to(start.dtype), False)

        with torch.autocast(v.device.type, enabled=False):
            # what the parts' own outputs say of their starts
            c = torch.zeros_like(start)
            if do is not None:
                factors = (sequences.entered_rows(do), sequences.by_part(reads))
                factors = tuple(x.to(operand_dtype(q)) for x in factors)
                found = torch.einsum("rthv,rthk->rhvk", *factors).to(start.dtype)
                c = found.unflatten(0, (-1, len(own))).transpose(0, 1)
            if end is not None:
                c = c + sequences.entering(end) @ own_A.transpose(-1, -2)
            c = ranks.gather(c)
            D, ends = torch.zeros_like(c[0]), []
            for place in reversed(ranks.places()):
                ends.append(D)
                D = D @ A[place].transpose(-1, -2) + c[place]
            composed = sequences.spread(torch.stack(ends[::-1])[own], False)
            end = composed if end is None else end + composed

        start = sequences.spread(start, True)
        if initial_state is not None:
            start = start + sequences.given(initial_state.to(start.dtype), True)
        inputs = (
            q, k, v, raw_gate, raw_beta, A_log, dt_bias, *gate, scale, start, True,
            *tables(sequences.offsets, q.shape[1]),
        )  # fmt: skip
        wanted = ctx.needs_input_grad[1:9]
        needs = [*wanted[:7], *[False] * (STATE - 7), wanted[7], *[False] * (RESULTS - STATE - 1)]
        found = op(*inputs, do, end, needs)
        gradients = [x if need else None for x, need in zip(found, wanted, strict=True)]
        if gradients[7] is not None:
            gradients[7] = sequences.returned(gradients[7], True)
        return None, *gradients, None, *[None] * len(packed)
