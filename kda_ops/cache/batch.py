"""One description of a server's batch, shared by all layers of a forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kda_ops import config
from kda_ops._checks import check_integer, check_shape, check_slot_values
from kda_ops._numerics import CHUNK
from kda_ops._tracing import reads_values
from kda_ops.cache.batch_checks import (
    check_batch_blocks,
    check_batch_values,
    check_counts,
    check_tensors,
    integers,
)
from kda_ops.cache.batch_tree import register_tree
from kda_ops.varlen import prepare_chunk_indices

COUNTS = (
    "num_decodes",
    "num_decode_tokens",
    "num_prefills",
    "num_prefill_tokens",
    "num_prefill_rows",
    "num_tokens",
)
TENSORS = (
    "cu_seqlens",
    "state_indices",
    "has_initial_state",
    "num_accepted",
    "prefill_num_accepted",
    "prefill_cu_seqlens",
    "prefill_copies",
    "chunk_indices",
    "block_table",
    "context_lens",
    "counts",
)
SMALL = 2**15  # rows, and sequences: up to here a layer's indices fit 32 bits


@dataclass(frozen=True, eq=False, kw_only=True)
class KDABatch:
    """Which rows of `hidden_states [1, num_tokens, hidden]` belong to which sequence, and where its
    state is.

    Rows are ordered **decode tokens | prefill tokens | padding**, sequences decodes | prefills. A
    decode continues from its state with a few tokens (one, or up to `1 + num_spec` speculative
    ones); a prefill has a prompt or the next chunk of one. Make one batch per step and pass it to
    every layer; `decode`, `prefill` and `mixed` make it from lengths.

    The constructor only launches device work and never synchronizes with a GPU: it can be called
    under CUDA-graph capture on buffers that are refilled before each replay. The row counts are
    Python ints.

    A compiled layer has at most three graphs, one for each `kind`, with `torch.compile`'s defaults
    and with `dynamic=True`. No count and no number of rows is specialized, not even 0 or 1;
    inconsistent arguments are rejected before anything is written. This requires that the layer is
    the first to read the batch and `hidden_states`. In a model whose rows come from another input,
    such as tokens, mark that input: `torch._dynamo.decorators.mark_unbacked(tokens, 1)`. (Steps of
    more than 32767 rows, which need 64-bit indices, have their own graphs.)

    A batch is a pytree of its tensors: `torch.export` accepts it, and
    `torch.utils._pytree.tree_map` moves it to another device.

    Attributes:
        cu_seqlens: `[N + 1]`, int32 or int64, first row of each sequence; empty sequences are
            allowed. Rows past the last one are padding.
        state_indices: `[N]` or `[N, 1 + num_spec]`, int32 or int64, pages of the state. In the
            second form, the recurrent state after speculative token j of a decode goes to page j of
            its row, and the convolution state and prefills use page 0. Slot 0 is the null block,
            and a negative slot is as good: nothing is read or written and the sequence's output is
            zero.
        has_initial_state: `[N]`, bool, whether a prefill continues from its slot instead of
            starting from zeros. Decodes always continue.
        num_accepted: `[num_decodes]`, int32 or int64: accepted tokens of the decode's last step, at
            least 1. Needs the second form of `state_indices`, with which None means 1 (and is
            replaced by ones).
        prefill_num_accepted: `[num_prefills]`, likewise, for prefills that may follow a speculative
            step: their state is first moved to page 0 and row 0, by one launch of
            `kda_ops.state_copy` per layer. After the step the count is 1, as after every prefill.
            Used only where `has_initial_state`. **None means that every prefill continues from the
            state of a prefill, or of a decode with one accepted token.** If only some steps have
            it, those with prefills have a graph with it and one without.
        block_table: `[num_prefills, blocks]`, int32 or int64: the page of the state after each full
            block of a prompt, which a prefill writes for blocks that end in it, with both states.
            Entries of 0 and negative ones are skipped. Needs `block_tokens`.
        context_lens: `[num_prefills]`, int32 or int64, with `block_table`: tokens of each prompt
            before this step, multiples of 64. None means zeros.
        block_tokens: Tokens of a block, a multiple of 64; a constant of compiled code.
        num_decodes: Decode sequences.
        num_decode_tokens: Rows of the decodes.
        num_prefills: Prefill sequences.
        num_prefill_tokens: Rows of the prefills.
        num_tokens: Rows of `hidden_states`, including padding.
        num_prefill_rows: Rows of the prefills and the padding. Not an argument; stored so that
            compiled code has a symbol for it instead of a difference of two, whose products
            Inductor cannot prove equal when it decides what fuses.
        counts: Not an argument. An empty tensor whose first sizes are the six counts, in the order
            of `COUNTS`, for traced code to read.
        kind: Not an argument. `"decode"` without prefills, `"prefill"` without decodes, `"mixed"`.
        prefill_cu_seqlens: `[num_prefills + 1]`, `cu_seqlens` of the prefills counted from their
            first row. Computed from `cu_seqlens` if not given.
        prefill_copies: Not an argument. `[num_prefills, 4]`, the plan of those moves, or None.
        chunk_indices: Chunk table of the prefills and the padding after them
            (`kda_ops.varlen.prepare_chunk_indices`). Computed from `cu_seqlens` if not given.

    Raises:
        ValueError: Inconsistent shapes, dtypes, devices or counts; for CPU tensors (and with
            `kda_ops.config.check_values` for all) also values.
    """

    cu_seqlens: Tensor
    state_indices: Tensor
    has_initial_state: Tensor
    num_accepted: Tensor | None = None
    prefill_num_accepted: Tensor | None = None
    block_table: Tensor | None = None
    context_lens: Tensor | None = None
    block_tokens: int | None = None
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    num_tokens: int
    prefill_cu_seqlens: Tensor | None = None
    chunk_indices: Tensor | None = None
    num_prefill_rows: int = field(init=False)
    prefill_copies: Tensor | None = field(init=False, repr=False, default=None)
    counts: Tensor = field(init=False, repr=False)
    kind: str = field(init=False, repr=False)
    _small: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_counts(self)
        self._set("num_prefill_rows", self.num_tokens - self.num_decode_tokens)
        check_tensors(self)
        on_cpu = self.cu_seqlens.device.type == "cpu"
        if (on_cpu or config.check_values) and reads_values(self.cu_seqlens):
            check_batch_values(self)
        sizes = (*(getattr(self, name) for name in COUNTS), 0)
        # zero strides: products of counts may overflow 64 bits
        counts = torch.empty_strided(sizes, (0,) * len(sizes), device=self.cu_seqlens.device)
        self._set("counts", counts)
        has = {"decode": self.num_decodes > 0, "prefill": self.num_prefills > 0}
        self._set(
            "kind", "mixed" if all(has.values()) else "prefill" if has["prefill"] else "decode"
        )
        self._set("_small", self._is_small())
        if self.num_accepted is None and self.state_indices.dim() == 2:
            self._set("num_accepted", self.state_indices.new_ones(self.num_decodes))
        if self.num_prefills == 0:
            return
        if self.prefill_num_accepted is not None:
            self._set("prefill_copies", self._copies(self.prefill_num_accepted))
        if self.prefill_cu_seqlens is None:
            offsets = self.cu_seqlens[self.num_decodes :] - self.num_decode_tokens
            self._set("prefill_cu_seqlens", offsets)
        if self.chunk_indices is None:
            self._set(
                "chunk_indices",
                prepare_chunk_indices(self.prefill_cu_seqlens, self.num_prefill_rows),
            )

    def _copies(self, num_accepted: Tensor) -> Tensor:
        """The `state_copy` plan for prefills before they run; negative rows do nothing."""
        state_indices, continues = self.prefills()
        bias = num_accepted - 1
        column = bias.clamp(0, state_indices.shape[1] - 1).long()
        source = state_indices.gather(1, column[:, None])[:, 0]
        plan = torch.stack([state_indices[:, 0], source, state_indices[:, 0], bias], dim=1)
        moves = continues & (bias != 0)
        return torch.where(moves[:, None], plan, -1).to(torch.int32)

    def _is_small(self) -> bool:
        return max(self.num_tokens, self.num_decodes + self.num_prefills) < SMALL

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def decode(
        cls,
        state_indices: Tensor | Sequence,
        *,
        lengths: Sequence[int] | None = None,
        num_accepted: Tensor | Sequence[int] | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of decodes, one token each without `lengths`; see `mixed`."""
        if lengths is None:
            lengths = [1] * len(state_indices)
        return cls.mixed(
            lengths,
            (),
            state_indices,
            num_accepted=num_accepted,
            num_tokens=num_tokens,
            device=device,
        )

    @classmethod
    def prefill(
        cls,
        lengths: Sequence[int],
        state_indices: Tensor | Sequence,
        *,
        has_initial_state: Tensor | Sequence[bool] | None = None,
        num_accepted: Tensor | Sequence[int] | None = None,
        block_table: Tensor | Sequence | None = None,
        context_lens: Tensor | Sequence[int] | None = None,
        block_tokens: int | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of prompts, or chunks of prompts where `has_initial_state`; see `mixed`.

        `num_accepted` is `prefill_num_accepted` of `mixed`, needed for a chunk after a speculative
        step.
        """
        return cls.mixed(
            (),
            lengths,
            state_indices,
            has_initial_state=has_initial_state,
            prefill_num_accepted=num_accepted,
            block_table=block_table,
            context_lens=context_lens,
            block_tokens=block_tokens,
            num_tokens=num_tokens,
            device=device,
        )

    @classmethod
    def mixed(
        cls,
        decode_lengths: Sequence[int],
        prefill_lengths: Sequence[int],
        state_indices: Tensor | Sequence,
        *,
        has_initial_state: Tensor | Sequence[bool] | None = None,
        num_accepted: Tensor | Sequence[int] | None = None,
        prefill_num_accepted: Tensor | Sequence[int] | None = None,
        block_table: Tensor | Sequence | None = None,
        context_lens: Tensor | Sequence[int] | None = None,
        block_tokens: int | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of decodes and prefills from the scheduler's lengths on the host.

        Args:
            decode_lengths: Tokens of each decode.
            prefill_lengths: Tokens of each prefill.
            state_indices: Pages of the sequences, decodes first, as a tensor or nested lists: `[N]`
                or `[N, 1 + num_spec]`.
            has_initial_state: `[num_prefills]`, which prefills continue from their slot. None means
                that all start from zeros.
            num_accepted: `[num_decodes]`, see the class.
            prefill_num_accepted: `[num_prefills]`, see the class.
            block_table: `[num_prefills, blocks]`, see the class.
            context_lens: `[num_prefills]`, see the class.
            block_tokens: See the class.
            num_tokens: Rows of `hidden_states`, including padding. None means no padding.
            device: Device of the batch. None means the device of `state_indices`, the CPU for
                lists.

        Raises:
            ValueError: As for the class.
        """
        if device is None:
            device = (
                state_indices.device if isinstance(state_indices, Tensor) else torch.device("cpu")
            )
        lengths = [*decode_lengths, *prefill_lengths]
        offsets = [0]
        for n, length in enumerate(lengths):
            check_integer("lengths", length)
            if length < 0:
                raise ValueError(f"lengths must not be negative, got {length} for sequence {n}")
            offsets.append(offsets[-1] + length)
        if has_initial_state is None:
            has_initial_state = [False] * len(prefill_lengths)
        continues = torch.as_tensor(has_initial_state, dtype=torch.bool, device=device)
        check_shape("has_initial_state", continues, (len(prefill_lengths),))
        return cls(
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
            state_indices=integers("state_indices", state_indices, device),
            has_initial_state=torch.cat([continues.new_ones(len(decode_lengths)), continues]),
            num_accepted=_given("num_accepted", num_accepted, device),
            prefill_num_accepted=_given("prefill_num_accepted", prefill_num_accepted, device),
            block_table=_given("block_table", block_table, device),
            context_lens=_given("context_lens", context_lens, device),
            block_tokens=block_tokens,
            num_decodes=len(decode_lengths),
            num_decode_tokens=sum(decode_lengths),
            num_prefills=len(prefill_lengths),
            num_prefill_tokens=sum(prefill_lengths),
            num_tokens=offsets[-1] if num_tokens is None else num_tokens,
        )

    def check_rows(self, hidden_states: Tensor) -> None:
        """Checks that the batch describes these rows `[1, num_tokens, hidden]`.

        In a trace, where sizes may be unbacked, this also establishes which of them are equal; the
        graph asserts it.

        Raises:
            ValueError: The batch has a different number of rows.
        """
        _, T, hidden = hidden_states.shape
        decodes, decode_rows, prefills, _, prefill_rows, tokens = self.counts.shape[:-1]
        if not torch.compiler.is_compiling():
            check_shape("hidden_states", hidden_states, (1, tokens, hidden))
            return
        check_shape("hidden_states", hidden_states, (1, T, hidden))
        torch._check(tokens == T)
        if self.kind == "mixed":
            torch._check(tokens == decode_rows + prefill_rows)
        elif self.kind == "prefill":
            decodes, prefill_rows = 0, tokens
        else:
            prefills = 0
        N = decodes + prefills
        if self._small:
            for size in (tokens, N):
                torch._check(size < SMALL)
            if self.kind == "mixed":
                for size in (decode_rows, prefill_rows, decodes, prefills):
                    torch._check(size < SMALL)
        torch._check(self.state_indices.shape[0] == N)
        if self.kind != "prefill":
            torch._check(self.cu_seqlens.shape[0] == N + 1)
            if self.num_accepted is not None:
                torch._check(self.num_accepted.shape[0] == decodes)
        if self.kind != "decode":
            torch._check(self.has_initial_state.shape[0] == N)
            torch._check(self.prefill_cu_seqlens.shape[0] == prefills + 1)
            torch._check(self.chunk_indices.shape[0] == prefill_rows // CHUNK + prefills)
            for plan in (self.prefill_copies, self.block_table, self.context_lens):
                if plan is not None:
                    torch._check(plan.shape[0] == prefills)

    def decodes(self) -> tuple[Tensor, Tensor]:
        """`cu_seqlens` and `state_indices` of the decodes."""
        if self.kind == "decode":
            return self.cu_seqlens, self.state_indices
        decodes, _, prefills, *_ = self.counts.shape
        return (
            self.cu_seqlens.split((decodes + 1, prefills))[0],
            self.state_indices.split((decodes, prefills))[0],
        )

    def prefills(self) -> tuple[Tensor, Tensor]:
        """`state_indices` and `has_initial_state` of the prefills."""
        if self.kind == "prefill":
            return self.state_indices, self.has_initial_state
        decodes, _, prefills, *_ = self.counts.shape
        return (
            self.state_indices.split((decodes, prefills))[1],
            self.has_initial_state.split((decodes, prefills))[1],
        )

    def blocks(self) -> dict[str, Any]:
        """The arguments of the prefills' operators for states at block boundaries; none without a
        table.
        """
        if self.block_table is None:
            return {}
        names = ("block_table", "context_lens", "block_tokens")
        return {name: getattr(self, name) for name in names}

    def check_slots(self, num_slots: int) -> None:
        """Checks that every slot exists in a state of `num_slots` pages, and that refilled tensors
        are still valid. Reads tensor values.

        Raises:
            ValueError: A slot does not exist or a tensor is invalid.
        """
        check_batch_values(self)
        check_slot_values("state_indices", self.state_indices, num_slots)
        check_batch_blocks(self, num_slots)


register_tree(KDABatch, TENSORS, COUNTS)


def _given(
    name: str, values: Tensor | Sequence | None, device: torch.device | str
) -> Tensor | None:
    return None if values is None else integers(name, values, device)
