"""The board: posted entries are found, entries being written are not."""

import numpy as np
import pytest

from kda_ops.transfer.board import (
    ANY_BLOCKS,
    BOARD_BYTES,
    BUCKET_BYTES,
    ENTRIES,
    ENTRY,
    Board,
    blocks_digest,
    bucket_of,
    find_entry,
)
from kda_ops.transfer.results import TransferError
from kda_ops.transfer.transport import InProcessNetwork, InProcessTransport
from tests.support.transfer_fleet import REMOTE, Side, geometry


def test_a_board_shows_what_is_offered() -> None:
    board = Board()
    assert BOARD_BYTES == board.region.nbytes == BUCKET_BYTES * 1024
    assert ENTRIES * ENTRY.size == BUCKET_BYTES

    def bucket(request: str) -> bytes:
        start = bucket_of(request) * BUCKET_BYTES
        return board._memory[start : start + BUCKET_BYTES].tobytes()

    names = [f"request {i}" for i in range(2000)]
    blocks = {name: blocks_digest([[i], [i, i + 1]]) for i, name in enumerate(names)}
    numbers = {name: board.put_up(name, blocks[name]) for name in names}
    assert len(set(numbers.values())) == len(names)
    for name in names:
        assert find_entry(bucket(name), name) == (numbers[name], blocks[name])
        assert find_entry(bucket(name), name + "x") is None
    for name in names[::2]:
        board.take_down(name)
    for name in names:
        assert (find_entry(bucket(name), name) is None) == (name in names[::2])
    again = board.put_up(names[0], blocks[names[0]])
    assert again > max(numbers.values())


def test_digests_of_blocks() -> None:
    """Equal blocks, equal digests, whatever kind of integers; lists are not run together."""
    lists = ([[3], [5, 6]], [[3], [6, 5]], [[3, 5], [6]], [[3], [5], [6]], [[], [3, 5, 6]], [[3]])
    digests = {blocks_digest(blocks) for blocks in lists}
    assert len(digests) == len(lists)
    assert ANY_BLOCKS not in digests
    assert blocks_digest([np.array([3]), np.array([5, 6], np.int32)]) == blocks_digest(lists[0])
    for bad in (1 << 63, 1.5, "3"):
        with pytest.raises(ValueError, match="blocks must be integers of 64 bits, got"):
            blocks_digest([[bad]])


def test_an_entry_being_written_does_not_count() -> None:
    """Every mixture of two entries, and of an entry and nothing, in one place."""
    board = Board()
    start = bucket_of("a") * BUCKET_BYTES
    states = [bytes(ENTRY.size)]
    for blocks in ([[1]], [[2]]):
        board.put_up("a", blocks_digest(blocks))
        states.append(board._memory[start : start + ENTRY.size].tobytes())
        board.take_down("a")
    for before in states:
        for after in states:
            for cut in range(1, ENTRY.size):
                mixed = before[:cut] + after[cut:]
                if mixed not in states:
                    assert find_entry(mixed, "a") is None


def test_a_full_bucket_is_an_error() -> None:
    engine = Side(InProcessTransport(InProcessNetwork(), "P0"), geometry(1), 0, "P").engine
    names = (f"n{i}" for i in range(10**6))
    crowd = [next(n for n in names if bucket_of(n) == 7) for _ in range(ENTRIES + 1)]
    for name in crowd[:-1]:
        engine.offer(name, REMOTE)
    with pytest.raises(TransferError, match=f"no room for {crowd[-1]!r} beside 32 other offers"):
        engine.offer(crowd[-1], REMOTE)
    engine.withdraw(crowd[0])
    engine.offer(crowd[-1], REMOTE)
