"""One description of a server's batch, shared by all layers of a forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kda_ops import config
from kda_ops._checks import (
    INTEGERS,
    check_chunk_values,
    check_chunks_shape,
    check_cu_seqlens_shape,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_slot_values,
)
from kda_ops.chunks import chunk_table
from kda_ops.formulas import CHUNK


@dataclass(frozen=True, eq=False, kw_only=True)
class KDABatch:
    """Which rows of `hidden_states [1, num_tokens, hidden]` belong to which sequence, and where its
    state lives.

    Rows are in the order **decode tokens | prefill tokens | padding**, sequences in the order
    decodes | prefills. A decode continues from its state with a few tokens (one, or up to `1 +
    num_spec` speculative ones); a prefill brings a prompt or the next chunk of one. Make the
    description once per step and give it to every layer; `decode`, `prefill` and `mixed` make it
    from lengths.

    The constructor launches device work only and never synchronises with a GPU: it can be called
    under CUDA-graph capture on buffers that are refilled before each replay. The row counts are
    Python ints. Compiled code branches on whether `num_decodes` and `num_prefills` are zero and on
    nothing else, so a layer has at most three graphs (decode, prefill, mixed), each of them dynamic
    in all counts (as everywhere in PyTorch, a count of 1 may get a graph of its own).

    Attributes:
        cu_seqlens: `[N + 1]`, int32 or int64, first row of each sequence; empty sequences are
            allowed. Rows past the last one are padding.
        slots: `[N]` or `[N, 1 + num_spec]`, int32 or int64, pages of the state. With the second
            form, speculative token j of a decode leaves the recurrent state after it in page j of
            its row, and the convolution state and prefills use page 0. Slot 0 is the null block:
            nothing is read or written there and the sequence's output is zero.
        has_initial_state: `[N]`, bool, whether a prefill continues from its slot instead of
            starting from zeros. Decodes always continue.
        num_accepted: `[num_decodes]`, int32 or int64, or None: how many tokens of the decode's last
            step were kept, from 1. None where nothing is speculative; else `slots` has the second
            form.
        num_decodes: Decode sequences.
        num_decode_tokens: Rows of the decodes.
        num_prefills: Prefill sequences.
        num_prefill_tokens: Rows of the prefills.
        num_tokens: Rows of `hidden_states`, padding included.
        num_prefill_rows: Rows of the prefills and the padding. Not an argument; a number of its own
            so that compiled code has a symbol for it instead of a difference of two, whose products
            Inductor does not find equal when it decides what fuses.
        prefill_cu_seqlens: `[num_prefills + 1]`, `cu_seqlens` of the prefills counted from their
            first row. Made from `cu_seqlens` where not given.
        chunks: Chunk table of the prefills and the padding after them
            (`kda_ops.chunks.chunk_table`). Made from `cu_seqlens` where not given.

    Raises:
        ValueError: Shapes, dtypes, devices or counts that do not fit together; for CPU tensors (and
            with `kda_ops.config.check_values` for all) also values.
    """

    cu_seqlens: Tensor
    slots: Tensor
    has_initial_state: Tensor
    num_accepted: Tensor | None = None
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    num_tokens: int
    prefill_cu_seqlens: Tensor | None = None
    chunks: Tensor | None = None
    num_prefill_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self._check_counts()
        object.__setattr__(self, "num_prefill_rows", self.num_tokens - self.num_decode_tokens)
        self._check_tensors()
        if config.check_values or self.cu_seqlens.device.type == "cpu":
            self._check_values()
        if self.num_prefills == 0:
            return
        if self.prefill_cu_seqlens is None:
            offsets = self.cu_seqlens[self.num_decodes :] - self.num_decode_tokens
            object.__setattr__(self, "prefill_cu_seqlens", offsets)
        if self.chunks is None:
            table = chunk_table(self.prefill_cu_seqlens, self.num_prefill_rows)
            object.__setattr__(self, "chunks", table)

    @classmethod
    def decode(
        cls,
        slots: Tensor | Sequence,
        *,
        lengths: Sequence[int] | None = None,
        num_accepted: Tensor | Sequence[int] | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of decodes, one token each unless `lengths` says otherwise; see `mixed`."""
        if lengths is None:
            lengths = [1] * len(slots)
        return cls.mixed(
            lengths, (), slots, num_accepted=num_accepted, num_tokens=num_tokens, device=device
        )

    @classmethod
    def prefill(
        cls,
        lengths: Sequence[int],
        slots: Tensor | Sequence,
        *,
        has_initial_state: Tensor | Sequence[bool] | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of prompts, or of chunks of prompts where `has_initial_state`; see `mixed`."""
        return cls.mixed(
            (),
            lengths,
            slots,
            has_initial_state=has_initial_state,
            num_tokens=num_tokens,
            device=device,
        )

    @classmethod
    def mixed(
        cls,
        decode_lengths: Sequence[int],
        prefill_lengths: Sequence[int],
        slots: Tensor | Sequence,
        *,
        has_initial_state: Tensor | Sequence[bool] | None = None,
        num_accepted: Tensor | Sequence[int] | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "KDABatch":
        """A batch of decodes and prefills from the lengths that a scheduler knows on the host.

        Args:
            decode_lengths: Tokens of each decode.
            prefill_lengths: Tokens of each prefill.
            slots: Pages of the sequences, decodes first, as a tensor or nested lists: `[N]` or `[N,
                1 + num_spec]`.
            has_initial_state: `[num_prefills]`, which prefills continue from their slot. None means
                that all start from zeros.
            num_accepted: `[num_decodes]`, see the class. None where nothing is speculative.
            num_tokens: Rows of `hidden_states`, padding included. None means no padding.
            device: Where the description lives. None means the device of `slots`, the CPU for
                lists.

        Raises:
            ValueError: As the class.
        """
        if device is None:
            device = slots.device if isinstance(slots, Tensor) else torch.device("cpu")
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
            slots=_integers("slots", slots, device),
            has_initial_state=torch.cat([continues.new_ones(len(decode_lengths)), continues]),
            num_accepted=None
            if num_accepted is None
            else _integers("num_accepted", num_accepted, device),
            num_decodes=len(decode_lengths),
            num_decode_tokens=sum(decode_lengths),
            num_prefills=len(prefill_lengths),
            num_prefill_tokens=sum(prefill_lengths),
            num_tokens=offsets[-1] if num_tokens is None else num_tokens,
        )

    def _check_counts(self) -> None:
        counts = ("num_decodes", "num_decode_tokens", "num_prefills", "num_prefill_tokens")
        for name in (*counts, "num_tokens"):
            check_integer(name, getattr(self, name))
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_decodes + self.num_prefills == 0:
            raise ValueError("num_decodes + num_prefills must be at least 1, got 0")
        rows = self.num_decode_tokens + self.num_prefill_tokens
        if self.num_tokens < rows:
            raise ValueError(f"num_tokens must be at least {rows}, got {self.num_tokens}")

    def _check_tensors(self) -> None:
        N = self.num_decodes + self.num_prefills
        check_device(
            cu_seqlens=self.cu_seqlens,
            slots=self.slots,
            has_initial_state=self.has_initial_state,
            num_accepted=self.num_accepted,
            prefill_cu_seqlens=self.prefill_cu_seqlens,
            chunks=self.chunks,
        )
        check_cu_seqlens_shape(self.cu_seqlens)
        check_shape("cu_seqlens", self.cu_seqlens, (N + 1,))
        check_dtype("slots", self.slots, INTEGERS)
        if self.slots.dim() not in (1, 2) or self.slots.shape[0] != N or self.slots.numel() == 0:
            raise ValueError(
                f"slots must have shape [{N}] or [{N}, 1 + num_spec], got {tuple(self.slots.shape)}"
            )
        check_dtype("has_initial_state", self.has_initial_state, (torch.bool,))
        check_shape("has_initial_state", self.has_initial_state, (N,))
        if self.num_accepted is not None:
            check_dtype("num_accepted", self.num_accepted, INTEGERS)
            check_shape("num_accepted", self.num_accepted, (self.num_decodes,))
            if self.slots.dim() == 1:
                raise ValueError(
                    "num_accepted must come with slots of shape [N, 1 + num_spec], "
                    f"got {tuple(self.slots.shape)}"
                )
        if self.prefill_cu_seqlens is not None:
            check_dtype("prefill_cu_seqlens", self.prefill_cu_seqlens, INTEGERS)
            check_shape("prefill_cu_seqlens", self.prefill_cu_seqlens, (self.num_prefills + 1,))
        if self.chunks is not None:
            check_chunks_shape(self.chunks, self.num_prefills, self.num_prefill_rows, CHUNK)

    def _check_values(self) -> None:
        rows = self.num_decode_tokens + self.num_prefill_tokens
        check_cu_seqlens_values(self.cu_seqlens, rows)
        start = int(self.cu_seqlens[self.num_decodes])
        if self.num_prefills and start != self.num_decode_tokens:
            raise ValueError(
                f"cu_seqlens must start the prefills at num_decode_tokens = "
                f"{self.num_decode_tokens}, got {start}"
            )
        offsets = self.cu_seqlens[self.num_decodes :] - self.num_decode_tokens
        given = None if self.prefill_cu_seqlens is None else self.prefill_cu_seqlens.tolist()
        if self.num_prefills and given not in (None, offsets.tolist()):
            raise ValueError(
                "prefill_cu_seqlens must be the prefills' part of cu_seqlens, "
                f"{offsets.tolist()}, got {given}"
            )
        if self.num_prefills and self.chunks is not None:
            check_chunk_values(self.chunks, offsets, self.num_prefill_rows, CHUNK)
        table = self.slots.reshape(len(self.slots), -1)
        owners: dict[int, int] = {}
        for n, slots in enumerate(table.tolist()):
            for slot in set(slots) - {0}:
                if owners.setdefault(slot, n) != n:
                    raise ValueError(
                        f"slots must not be shared between sequences, "
                        f"got {slot} for sequences {owners[slot]} and {n}"
                    )
        most = table.shape[1]
        lengths = self.cu_seqlens[: self.num_decodes + 1].diff()
        if (lengths > most).any():
            raise ValueError(
                f"cu_seqlens must give each decode at most {most} tokens, one per column of slots, "
                f"got {int(lengths.max())}"
            )
        if self.num_accepted is not None:
            padding = (table[: self.num_decodes] == 0).all(dim=1)
            bad = ((self.num_accepted < 1) | (self.num_accepted > most)) & ~padding
            if bad.any():
                raise ValueError(
                    f"num_accepted must be in [1, {most}], got {int(self.num_accepted[bad][0])}"
                )

    def check_slots(self, num_slots: int) -> None:
        """Every slot exists in a state of `num_slots` pages, and tensors that were refilled hold
        what the constructor takes. Reads tensor values.

        Raises:
            ValueError: They are not.
        """
        self._check_values()
        check_slot_values("slots", self.slots, num_slots)


def _integers(name: str, values: Tensor | Sequence, device: torch.device | str) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(device)
    try:
        found = torch.tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be lists of integers, got {values!r}") from error
    if found.numel():  # an empty list has no dtype
        check_dtype(name, found, INTEGERS)
    return found.to(torch.int32)
