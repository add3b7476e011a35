"""The invariant of `kda_ops.transfer.reads` over random interleavings; without any one part of the
protocol, the same interleavings break it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kda_ops.transfer import reads
from kda_ops.transfer.board import ANY_BLOCKS, Board, Entry
from kda_ops.transfer.offers import Offers
from kda_ops.transfer.reads import ASKING, CONFIRMING, Reads
from tests.support.transfer_model import BrokenInvariantError, World

STEPS = 3000


def go(seeds: int, p: int, d: int) -> Counter[str]:
    """Counts of how the reads of some simulations ended."""
    outcomes: Counter[str] = Counter()
    for seed in range(seeds):
        world = World(seed, p, d)
        world.run(STEPS)
        world.settle()
        outcomes += world.outcomes
    return outcomes


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_no_read_ends_done_without_a_held_offer(p: int, d: int) -> None:
    outcomes = go(6, p, d)
    # a check that reached none of the ends would hold of anything
    assert outcomes["done"] > 50
    assert outcomes["failed"] > 200
    assert outcomes["cancelled"] > 10
    assert outcomes["timeout"] > 5


# ---------------------------------------------------------------------- protocols that do not hold

Patch = Callable[[pytest.MonkeyPatch], None]
CHECK, ANSWERED, HERE = Reads._check_answer, Reads._is_answered, Reads._pages_are_here
NotHeldError = reads._NotHeldError


def not_confirmed(patch: pytest.MonkeyPatch) -> None:
    """The source is asked before the read, but not after it."""

    def check(self: Reads, reading: Any, part: Any, entry: Entry | None) -> None:
        if reading.step == ASKING:
            CHECK(self, reading, part, entry)

    patch.setattr(Reads, "_check_answer", check)


def confirmed_by_name(patch: pytest.MonkeyPatch) -> None:
    """Some offer of that name and of those blocks, but not the one before the read."""

    def check(self: Reads, reading: Any, part: Any, entry: Entry | None) -> None:
        if reading.step == CONFIRMING and entry is not None:
            part.offer = entry.number
        CHECK(self, reading, part, entry)

    patch.setattr(Reads, "_check_answer", check)


def only_confirmed(patch: pytest.MonkeyPatch) -> None:
    """The source is asked after the read, but not before it."""

    def check(self: Reads, reading: Any, part: Any, entry: Entry | None) -> None:
        if reading.step == ASKING:
            return
        if entry is None or entry.blocks not in (reading.blocks, ANY_BLOCKS):
            raise NotHeldError
        part.offer = entry.number

    patch.setattr(Reads, "_check_answer", check)


def confirmed_too_early(patch: pytest.MonkeyPatch) -> None:
    """The source is asked for the second time while the read runs."""

    def answered(self: Reads, reading: Any) -> bool:
        return ANSWERED(self, reading) and (reading.step == ASKING or HERE(self, reading))

    patch.setattr(Reads, "_pages_are_here", lambda self, reading: True)
    patch.setattr(Reads, "_is_answered", answered)


def of_any_blocks(patch: pytest.MonkeyPatch) -> None:
    """An offer of the name is enough."""
    patch.setattr("kda_ops.transfer.offers.blocks_digest", lambda blocks: ANY_BLOCKS)


def numbers_again(patch: pytest.MonkeyPatch) -> None:
    """Every offer has the same number."""
    put_up = Board.put_up

    def again(self: Board, request: str, blocks: bytes) -> int:
        self._next = 1
        return put_up(self, request, blocks)

    patch.setattr(Board, "put_up", again)


def down_too_late(patch: pytest.MonkeyPatch) -> None:
    """A release is reported before its entry is removed."""
    take_down, offer = Board.take_down, Offers.offer
    late: list[tuple[Board, str]] = []

    def down() -> None:
        while late:
            take_down(*late.pop())

    def first_down(self: Offers, *arguments: Any) -> None:
        down()
        offer(self, *arguments)

    patch.setattr(Board, "take_down", lambda self, request: late.append((self, request)))
    patch.setattr(Offers, "offer", first_down)


@pytest.mark.parametrize(
    "broken",
    [
        not_confirmed,
        confirmed_by_name,
        only_confirmed,
        confirmed_too_early,
        of_any_blocks,
        numbers_again,
        down_too_late,
    ],
    ids=lambda broken: broken.__name__,
)
def test_every_part_of_the_protocol_is_needed(
    monkeypatch: pytest.MonkeyPatch, broken: Patch
) -> None:
    broken(monkeypatch)
    with pytest.raises(BrokenInvariantError):
        go(40, 1, 1)
