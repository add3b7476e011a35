"""The board of a rank: the offers it currently holds, in memory that readers can read one-sided.

An entry is posted before anybody learns a request's blocks, and removed before its pages may
change. It has a number that its rank never reuses, and a tag over its contents: an entry that is
read while being written does not count. A request's name determines its bucket, so that a reader
finds the entry with one small read.
"""

import hashlib
import secrets
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kda_ops.transfer.results import TransferError
from kda_ops.transfer.transport import Ranges, Region

ENTRY = struct.Struct("<Q8s16s")  # number, digest of the blocks, tag
ENTRIES = 32  # per bucket; with 8192 offers at once one overflows with probability 1e-8
BUCKETS = 1024
BUCKET_BYTES = ENTRIES * ENTRY.size
BOARD_BYTES = BUCKETS * BUCKET_BYTES
ANY_BLOCKS = bytes(8)


class Entry(NamedTuple):
    """An offer as a reader sees it.

    Attributes:
        number: Unique to this offer.
        blocks: `blocks_digest` of what is offered, or `ANY_BLOCKS`.
    """

    number: int
    blocks: bytes


def blocks_digest(blocks: Sequence[Sequence[int]]) -> bytes:
    """An 8-byte digest of the blocks of a request; see `held_blocks`.

    Raises:
        ValueError: Blocks that are not 64-bit integers.
    """
    digest = hashlib.blake2b(digest_size=len(ANY_BLOCKS))
    for group in blocks:
        try:
            digest.update(struct.pack(f"<{1 + len(group)}q", len(group), *group))
        except struct.error as error:
            raise ValueError(f"blocks must be integers of 64 bits, got {error}") from None
    return digest.digest()


def bucket_of(request: str) -> int:
    """The bucket of a request's entry."""
    return int.from_bytes(hashlib.sha256(request.encode()).digest()[:4], "little") % BUCKETS


def find_entry(bucket: bytes, request: str) -> Entry | None:
    """The entry of a request in its bucket, from an untrusted peer."""
    for number, blocks, tag in ENTRY.iter_unpack(bucket):
        if number and tag == _tag(number, blocks, request):
            return Entry(number, blocks)
    return None


def _tag(number: int, blocks: bytes, request: str) -> bytes:
    return hashlib.sha256(struct.pack("<Q8s", number, blocks) + request.encode()).digest()[:16]


class Board:
    """The offers that a rank publishes; register its `region` for its peers."""

    def __init__(self) -> None:
        self._memory = np.zeros(BOARD_BYTES, np.uint8)
        self._places: dict[str, int] = {}
        self._taken: set[int] = set()
        self._next = secrets.randbelow(1 << 39) + 1  # unlike an earlier engine's of this name

    @property
    def region(self) -> Region:
        """Its place in host memory."""
        return Region(self._memory.ctypes.data, BOARD_BYTES, 0)

    def put_up(self, request: str, blocks: bytes) -> int:
        """Publishes an offer and returns its number.

        Raises:
            TransferError: There are too many offers.
        """
        first = bucket_of(request) * ENTRIES
        place = next((p for p in range(first, first + ENTRIES) if p not in self._taken), None)
        if place is None:
            raise TransferError(f"no room for {request!r} beside {len(self._taken)} other offers")
        number, self._next = self._next, self._next + 1
        entry = ENTRY.pack(number, blocks, _tag(number, blocks, request))
        self._entry(place)[:] = np.frombuffer(entry, np.uint8)
        self._places[request] = place
        self._taken.add(place)
        return number

    def take_down(self, request: str) -> None:
        """Ends an offer for all readers that have not asked a second time."""
        place = self._places.pop(request)
        self._taken.remove(place)
        self._entry(place)[:] = 0

    def _entry(self, place: int) -> np.ndarray:
        return self._memory[place * ENTRY.size : (place + 1) * ENTRY.size]


def bucket_ranges(region: Region) -> list[Ranges]:
    """A region as ranges of one bucket each, for the transport to prepare."""
    number = region.nbytes // BUCKET_BYTES
    return [Ranges(region.address, BUCKET_BYTES, region.device, BUCKET_BYTES, number)]
