"""The recurrence over the ranks of a context, by affine maps.

A part of the tokens maps the state before it to `S A + b` (S `[V, K]`, A `[K, K]`, b `[V, K]`): b
is its final state from zero, and row i of A that from row i of the identity, with v = 0. All ranks
get the maps of all parts, and each composes those before its own. Backward, a part maps the
gradient at its end, D, to `D A^T + c`, with c the gradient that its own outputs have for its
start; A is kept from the forward.

Packed sequences need the map of one sequence per part: the one that is there at its end. Where that
one begins in the part, A is 0.
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
        """The states `[m, R, ...]` at the ends of the parts, from those of `last_tables`."""
        if self.packed is None:
            return self.entering(states)
        return states[1::2].unsqueeze(1)

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

    def given_to_last(self, states: Tensor) -> Tensor:
        """`given` initial states, for the sequences of `last_tables`."""
        packed = self.packed
        if packed is None:
            return self.given(states, True)
        found = masked(states[None], packed.begins & packed.last).sum(1)  # [m, ...]
        return torch.stack([torch.zeros_like(found), found], 1).flatten(0, 1)


def masked(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None, None, None], states, 0)


def tables(cu_seqlens: Tensor | None, tokens: Any) -> tuple[Tensor | None, Tensor | None]:
    """The last two arguments of the operator."""
    if cu_seqlens is None:
        return None, None
    return cu_seqlens, prepare_chunk_indices(cu_seqlens, tokens)


def operators(namespace: str) -> tuple[Any, Any]:
    """The recurrence and its gradient, of the kernels or of the reference."""
    ops = getattr(torch.ops, namespace)
    return ops.chunk_kda_gated.default, ops.chunk_kda_gated_backward.default


class Scan(Function):
    """`chunk_kda_gated` over the ranks of a context: one all-gather of maps, and backward one of
    gradients.

    A function of its own, since the derivative of composing maps would gather and compose anew what
    backward needs only once, from the operator's own gradient.
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
        acc, K = accumulation_dtype(q), q.shape[3]
        raw = (raw_gate, raw_beta, A_log, dt_bias, *gate, scale)

        # the maps of this rank's parts
        last = tables(sequences.packed and sequences.packed.last_cu_seqlens, q.shape[1])
        first = None
        if initial_state is not None:
            first = sequences.given_to_last(initial_state.to(acc))
        b = sequences.at_last(op(q, k, v, *raw, first, True, *last)[1])  # [m, R, HV, V, K]
        count = q.shape[0] if last[0] is None else len(last[0]) - 1
        identity = torch.eye(K, dtype=acc, device=q.device)
        identity = identity.expand(count, v.shape[2], K, K).contiguous()
        nothing = v.new_zeros(*v.shape[:3], K)
        A = sequences.at_last(op(q, k, nothing, *raw, identity, True, *last)[1])
        if sequences.packed is not None:
            A = torch.where(sequences.packed.renewed[:, None, None, None, None], 0, A)

        # composed to the states before them
        maps = ranks.gather(torch.cat([A, b], -2))
        A, b = maps.split([K, v.shape[3]], -2)
        S, starts = torch.zeros_like(b[0]), []
        for place in ranks.places():
            starts.append(S)
            S = S @ A[place] + b[place]
        start = sequences.spread(torch.stack(starts)[own], True)
        if initial_state is not None:
            start = start + sequences.given(initial_state.to(acc), True)

        offsets = tables(sequences.offsets, q.shape[1])
        o, final = op(q, k, v, *raw, start, output_final_state, *offsets)
        if output_final_state:
            final = sequences.returned(final, False)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, k, v, raw_gate, raw_beta, A_log, dt_bias, start, A, own, *packed
        )  # fmt: skip
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, raw_gate, raw_beta, A_log, dt_bias, start, A, own, *packed = ctx.saved_tensors
        ranks, namespace, *gate, scale, output_final_state = ctx.constants
        _, op = operators(namespace)
        sequences = Sequences(own, ranks.size * ranks.parts, Packed(*packed) if packed else None)
        offsets = tables(sequences.offsets, q.shape[1])
        inputs = (
            q, k, v, raw_gate, raw_beta, A_log, dt_bias, *gate, scale, start, True, *offsets,
        )  # fmt: skip
        end = None
        if output_final_state and dfinal is not None:
            end = sequences.given(dfinal.to(start.dtype), False)

        # what the parts' own outputs say of their starts
        needs = [i == STATE for i in range(RESULTS)]
        c = ranks.gather(sequences.entering(op(*inputs, do, end, needs)[-1]))
        D, ends = torch.zeros_like(c[0]), []
        for place in reversed(ranks.places()):
            ends.append(D)
            D = D @ A[place].transpose(-1, -2) + c[place]
        composed = sequences.spread(torch.stack(ends[::-1])[own], False)
        end = composed if end is None else end + composed

        wanted = ctx.needs_input_grad[1:9]
        needs = [*wanted[:7], *[False] * (STATE - 7), wanted[7], *[False] * (RESULTS - STATE - 1)]
        found = op(*inputs, do, end, needs)
        gradients = [x if need else None for x, need in zip(found, wanted, strict=True)]
        if gradients[7] is not None:
            gradients[7] = sequences.returned(gradients[7], True)
        return None, *gradients, None, *[None] * len(packed)
