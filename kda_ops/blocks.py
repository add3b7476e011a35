"""States at block boundaries within sequences, each in a page of its own: what a prefix cache keeps
of a prompt.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops._checks import (
    INTEGERS,
    check_device,
    check_dtype,
    check_integer,
    check_rank,
    check_shape,
    check_slot_values,
)
from kda_ops._numerics import CHUNK
from kda_ops.varlen import pages_of

BLOCK_ARGUMENTS = "Tensor? block_table, Tensor? context_lens, int block_tokens"  # of a schema


class Blocks(NamedTuple):
    """The page of the state after each full block of each sequence, `[N, blocks]`; the tokens of
    each sequence before this call, `[N]`, None for zeros; the tokens of a block.
    """

    table: Tensor
    context_lens: Tensor | None
    tokens: int

    @staticmethod
    def of(
        block_table: Tensor | None, context_lens: Tensor | None, block_tokens: int
    ) -> "Blocks | None":
        """From the arguments of an operator."""
        return None if block_table is None else Blocks(block_table, context_lens, block_tokens)

    def ends(
        self, offsets: Tensor, live: Tensor, slots: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks that end among the tokens of a call, in the order of the sequences, and of the
        blocks of each.

        Args:
            offsets: `[N + 1]`, int64, the tokens of each sequence in this call.
            live: `[N]`, bool, the sequences that have a page.
            slots: Pages from this one on do not exist. None: entries may name any.

        Returns:
            The sequence of each, how many of its tokens in this call are up to there, and the page;
            int64.
        """
        before = torch.zeros_like(offsets[1:])
        if self.context_lens is not None:
            before = self.context_lens.long()
        column = torch.arange(self.table.shape[1], device=offsets.device)
        end = (column + 1) * self.tokens - before[:, None]
        page = self.table.long()
        # the state is known at the ends of chunks, which are counted from the call's first token
        written = (live & (before % CHUNK == 0))[:, None] & (page > 0)
        written &= (end > 0) & (end <= offsets.diff()[:, None])
        if slots is not None:
            written &= page < slots
        sequence, column = written.nonzero().unbind(1)
        return sequence, end[sequence, column], page[sequence, column]


def block_arguments(
    blocks: Blocks | None,
) -> tuple[tuple[Tensor | None, Tensor | None], Any]:
    """What a kernel gets: both tables, and the columns of the first."""
    if blocks is None:
        return (None, None), None
    contexts = None if blocks.context_lens is None else blocks.context_lens.contiguous()
    return (blocks.table.contiguous(), contexts), blocks.table.shape[1]


def check_blocks(
    name: str, state: Tensor | None, sequences: int, block_table: Tensor | None,
    context_lens: Tensor | None, block_tokens: int | None,
) -> None:  # fmt: skip
    """The arguments for block boundaries of an operator whose state is called `name`."""
    if block_table is None:
        for other, value in (("context_lens", context_lens), ("block_tokens", block_tokens)):
            if value is not None:
                raise ValueError(f"{other} must come with block_table, got {other} alone")
        return
    if state is None:
        raise ValueError(f"block_table must come with {name}, got block_table alone")
    check_dtype("block_table", block_table, INTEGERS)
    check_rank("block_table", block_table, 2)
    check_shape("block_table", block_table, (sequences, block_table.shape[1]))
    if context_lens is not None:
        check_dtype("context_lens", context_lens, INTEGERS)
        check_shape("context_lens", context_lens, (sequences,))
    check_block_tokens(block_tokens)
    check_device(**{name: state, "block_table": block_table, "context_lens": context_lens})


def check_block_tokens(block_tokens: int | None) -> None:
    check_integer("block_tokens", block_tokens)
    if block_tokens is None or block_tokens < 1 or block_tokens % CHUNK:
        raise ValueError(f"block_tokens must be a positive multiple of {CHUNK}, got {block_tokens}")


def check_block_values(
    slots: int, state_indices: Tensor | None, offsets: Tensor, blocks: Blocks | None,
    others: Iterable[int] = (),
) -> None:  # fmt: skip
    """Contents of the tables of block boundaries, of sequences with valid offsets and slots.

    No page is written twice, but for the same state at the end of a sequence. `slots`: the number
    of pages. `others`: pages that something else writes.
    """
    if blocks is None:
        return
    own, live = pages_of(state_indices, len(offsets) - 1, offsets.device)
    if blocks.context_lens is not None:
        for n, (before, has_page) in enumerate(
            zip(blocks.context_lens.tolist(), live.tolist(), strict=True)
        ):
            if has_page and (before < 0 or before % CHUNK):
                raise ValueError(
                    f"context_lens must be multiples of {CHUNK} with block_table, "
                    f"got {before} for sequence {n}"
                )
    sequence, end, page = blocks.ends(offsets, live, None)
    check_slot_values("block_table", page, slots)
    taken = {*own[live].tolist(), *others}
    pages, lengths = own.tolist(), offsets.diff().tolist()
    for n, stop, slot in zip(sequence.tolist(), end.tolist(), page.tolist(), strict=True):
        if slot in taken and not (slot == pages[n] and stop == lengths[n]):
            raise ValueError(
                "block_table must not name a page that the same call writes otherwise, "
                f"got {slot} for sequence {n}"
            )
        taken.add(slot)
