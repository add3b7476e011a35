"""Reads of a request's pages from the ranks of another engine: the reader's side of the protocol.

A read is one-sided: its source takes no part in it and cannot stop it. So the reader checks whether
the bytes it got still belonged to the request on the source's board (`kda_ops.transfer.board`),
memory that it reads like pages.

Invariant: **a read ends `done` only if every source rank that gave it bytes held one and the same
offer of the request and of its blocks from before the first byte was read until after the last.**

    reader                              source rank
                                        offer: entry posted with a new number, pages kept
    1  ask: read the request's bucket   (takes no part)
       no entry, or other blocks: failed, nothing was read
    2  read the pages                   (takes no part)
    3  ask again: the same number?      (takes no part)
       no: failed, the pages are spoiled
    4  done; notice with the number --> counted; sent by all ranks of an engine, expired or
                                        withdrawn: entry removed, then released

Each step begins when the previous one has ended on every source rank. A number is never used twice
and an ended offer never returns, so that the same number before and after proves that the offer was
posted in between; and the source removes an entry before it reports the release that lets pages
change. Correctness does not depend on time: leases (time to live, `renew`) run on the source's
clock alone, and an expired offer is held until the source's `poll` has ended it. A successful read
sends one message per pair of ranks, the notice; lost, late and repeated notices delay the release
of a page but never corrupt a read. See `docs/transfer-protocol.md`.
"""

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kda_ops.transfer.asks import Ask, Asks
from kda_ops.transfer.blocks import GroupMatch
from kda_ops.transfer.board import ANY_BLOCKS, Entry
from kda_ops.transfer.geometry import EngineGeometry
from kda_ops.transfer.messages import Notice, encode_notice
from kda_ops.transfer.pages import zero_tails
from kda_ops.transfer.peers import Peer, Peers, Source
from kda_ops.transfer.results import Counters, ReadResult
from kda_ops.transfer.transport import ACTIVE, DONE, Transport, TransportError

REMEMBERED_REQUESTS = 65536

ASKING, READING, CONFIRMING, OVER = range(4)

log = logging.getLogger(__name__)


class _NotHeldError(Exception):
    """A source rank does not hold the offer, or holds a different one."""


@dataclass(eq=False)
class _Part:
    """The part of a read from one source rank, as indices into its prepared lists.

    Attributes:
        offer: Number of the offer, once known.
        ask: The ask in flight.
        transfer: The read of the pages, once posted.
    """

    source: Source
    local: np.ndarray
    remote: np.ndarray
    offer: int = 0
    ask: Ask | None = None
    transfer: Any = None


@dataclass(eq=False)
class _Reading:
    """A read; `unasked` are the parts without an answer in this step."""

    request: str
    peer: Peer
    matches: list[GroupMatch]
    pages: set[tuple[int, int]]
    blocks: bytes
    started: float
    deadline: float
    parts: list[_Part] = field(default_factory=list)
    unasked: list[_Part] = field(default_factory=list)
    step: int = ASKING
    in_flight: bool = False
    bytes: Counter[str] = field(default_factory=Counter)


class Reads:
    """The reads of a rank.

    Args:
        transport: The engine's, like the following.
        geometry: Likewise.
        pages: Likewise.
        peers: Likewise.
        counters: Likewise.
        asks: Likewise.
        clock: Likewise.
        reader: Name of the engine and its rank.
    """

    def __init__(
        self,
        transport: Transport,
        geometry: EngineGeometry,
        pages: Sequence[Sequence[Tensor]],
        peers: Peers,
        counters: Counters,
        asks: Asks,
        clock: Callable[[], float],
        reader: tuple[str, int],
    ) -> None:
        self._transport, self._geometry, self._pages = transport, geometry, pages
        self._peers, self._counters, self._asks = peers, counters, asks
        self._clock, self._reader = clock, reader
        self._running: dict[str, _Reading] = {}
        self._draining: list[_Reading] = []
        self._written: dict[tuple[int, int], str] = {}
        self._ended: list[ReadResult] = []
        self._drained: list[str] = []
        self._read_before: OrderedDict[tuple[str, str], None] = OrderedDict()

    def check_request(self, request: str, engine: str) -> None:
        """Checks that a request may be read.

        Raises:
            ValueError: It is being read, or has been read.
        """
        if request in self._running or any(
            r.request == request and r.in_flight for r in self._draining
        ):
            raise ValueError(f"request must not be read twice at once, got {request!r}")
        if (engine, request) in self._read_before:
            raise ValueError(f"request must not be read again after its notice, got {request!r}")

    def check_unwritten(self, name: str, pages: set[tuple[int, int]]) -> None:
        """Checks that no read may be writing these pages, by group.

        Raises:
            ValueError: One may be written.
        """
        taken = pages & self._written.keys()
        if taken:
            i, page = min(taken)
            raise ValueError(
                f"{name} group {i} must hold pages that no other read writes, got {page}, "
                f"which belongs to {self._written[i, page]!r}"
            )

    def start(
        self,
        request: str,
        peer: Peer,
        matches: list[GroupMatch],
        pages: set[tuple[int, int]],
        blocks: bytes,
        timeout_s: float,
    ) -> None:
        """Starts a read whose arguments have been checked."""
        now = self._clock()
        reading = _Reading(request, peer, matches, pages, blocks, now, now + timeout_s)
        reading.parts = [p for source in peer.sources if (p := self._plan(source, reading))]
        reading.unasked = list(reading.parts)
        self._written.update(dict.fromkeys(pages, request))
        self._running[request] = reading
        peer.active += 1
        try:
            for part in reading.parts:
                self._ask(part, request)
        except TransportError as error:
            self._lose(reading, error)

    def _plan(self, source: Source, reading: _Reading) -> _Part | None:
        """The part of a request from one rank, None if there is none."""
        ours, theirs = [], []
        for group, geometry, other, match in zip(
            source.groups,
            self._geometry.groups,
            reading.peer.geometry.groups,
            reading.matches,
            strict=True,
        ):
            to, at = group.granules(match, geometry.pages, other.pages)
            ours.append((group.local[:, None] + to).ravel())
            theirs.append((group.remote[:, None] + at).ravel())
            for read in group.plan.reads:
                name = f"{geometry.name}.{read.segment}"
                reading.bytes[name] += read.nbytes * len(to) * geometry.layers
        local, remote = (np.concatenate(x).astype(np.int32) for x in (ours, theirs))
        return _Part(source, local, remote) if len(local) else None

    # ------------------------------------------------------------------ the steps

    def advance(self) -> None:
        """Advances every read, and ends those that are over."""
        now = self._clock()
        for reading in list(self._running.values()):
            try:
                over = self._advance(reading)
            except TransportError as error:
                self._lose(reading, error)
                continue
            except _NotHeldError as error:
                self._end(reading, "failed", str(error))
                continue
            if over:
                self._complete(reading)
            elif now >= reading.deadline:
                seconds = reading.deadline - reading.started
                self._end(reading, "timeout", f"not done within {seconds:g} s")
        for reading in list(self._draining):
            asks, transfers = self._active(reading)
            if reading.in_flight and not transfers:
                reading.in_flight = False
                self._free_pages(reading)
                self._drained.append(reading.request)
            if not asks and not transfers:
                self._draining.remove(reading)
                self._finish(reading)

    def _advance(self, reading: _Reading) -> bool:
        """Takes all possible steps; returns whether the read is complete."""
        while reading.step != OVER:
            ended = self._pages_are_here if reading.step == READING else self._is_answered
            if not ended(reading):
                return False
            reading.step += 1
            reading.unasked = list(reading.parts)
            if reading.step == READING:
                self._post_pages(reading)
        return True

    def _post_pages(self, reading: _Reading) -> None:
        for part in reading.parts:
            source = part.source
            with _naming(source):
                part.transfer = self._transport.read(
                    source.local, part.local, source.remote, part.remote
                )
            self._counters.reads += 1
            self._counters.ranges += len(part.local)

    def _ask(self, part: _Part, request: str) -> None:
        """Asks a source rank, or later if no slot is free."""
        with _naming(part.source):
            part.ask = self._asks.post(part.source, request)

    def _pages_are_here(self, reading: _Reading) -> bool:
        states = [self._transport.status(part.transfer) for part in reading.parts]
        for part, state in zip(reading.parts, states, strict=True):
            if state not in (ACTIVE, DONE):
                raise TransportError(f"rank {part.source.rank}: a read of pages failed")
        return ACTIVE not in states

    def _is_answered(self, reading: _Reading) -> bool:
        """Whether every source rank holds the offer; asks those that have not been asked."""
        waiting = []
        for part in reading.unasked:
            if part.ask is None:
                self._ask(part, reading.request)
            state = ACTIVE if part.ask is None else self._asks.status(part.ask)
            if state == ACTIVE:
                waiting.append(part)
                continue
            ask, part.ask = part.ask, None
            with _naming(part.source):
                entry = self._asks.take(ask, reading.request)
                if state != DONE:
                    raise TransportError("its board could not be read")
            self._check_answer(reading, part, entry)
        reading.unasked = waiting
        return not waiting

    def _check_answer(self, reading: _Reading, part: _Part, entry: Entry | None) -> None:
        rank, request = part.source.rank, reading.request
        if reading.step == CONFIRMING:
            if entry is None or entry.number != part.offer:
                raise _NotHeldError(f"rank {rank} ended its offer of {request!r} during the read")
            return
        if entry is None:
            raise _NotHeldError(f"rank {rank} does not offer {request!r}, or no more")
        if entry.blocks not in (reading.blocks, ANY_BLOCKS):
            raise _NotHeldError(f"rank {rank} offers {request!r} with other blocks")
        part.offer = entry.number

    # ------------------------------------------------------------------ the end

    def _complete(self, reading: _Reading) -> None:
        """All bytes are valid: zeroes what no remote page covered, notifies every source rank."""
        for geometry, layers, match in zip(
            self._geometry.groups, self._pages, reading.matches, strict=True
        ):
            zero_tails(layers, geometry, match.zero)
        self._read_before[reading.peer.name, reading.request] = None
        while len(self._read_before) > REMEMBERED_REQUESTS:
            self._read_before.popitem(last=False)
        numbers = {part.source.rank: part.offer for part in reading.parts}
        for source in reading.peer.sources:
            number = numbers.get(source.rank, 0)
            notice = Notice(*self._reader, reading.request, number, reading.blocks.hex())
            try:
                self._transport.notify(source.agent, encode_notice(notice))
            except TransportError as error:
                # the pages are here: the offer will expire on the other side
                log.warning("no notice to rank %d: %s", source.rank, error)
        self._counters.bytes.update(reading.bytes)
        milliseconds = (self._clock() - reading.started) * 1e3
        self._counters.latency[math.ceil(math.log2(max(milliseconds, 1e-3)))] += 1
        self._end(reading, "done", "")

    def cancel(self, request: str) -> None:
        """Ends a read.

        Raises:
            ValueError: No such read is running.
        """
        if request not in self._running:
            raise ValueError(f"request must be a running read, got {request!r}")
        self._end(self._running[request], "cancelled", "cancelled")

    def cancel_all(self) -> None:
        """Ends all reads."""
        for request in list(self._running):
            self.cancel(request)

    def _lose(self, reading: _Reading, error: TransportError) -> None:
        self._peers.lose(reading.peer)
        self._end(reading, "failed", f"engine {reading.peer.name}: {error}")

    def _end(self, reading: _Reading, outcome: str, error: str) -> None:
        del self._running[reading.request]
        asks, transfers = self._active(reading)
        reading.in_flight = transfers
        if not transfers:
            self._free_pages(reading)
        if asks or transfers:
            self._draining.append(reading)
        else:
            self._finish(reading)
        self._counters.outcomes[outcome] += 1
        if outcome != "done":
            log.warning("read of %s: %s, %s", reading.request, outcome, error)
        seconds = self._clock() - reading.started
        spoiled = self._spoiled(reading, outcome)
        self._ended.append(ReadResult(reading.request, outcome, error, transfers, seconds, spoiled))

    def _spoiled(self, reading: _Reading, outcome: str) -> tuple[tuple[int, ...], ...]:
        """Local blocks, per group, that a read may have left undefined."""
        if outcome == "done" or all(part.transfer is None for part in reading.parts):
            return tuple(() for _ in reading.matches)
        return tuple(
            tuple(sorted({copy.local_page // group.pages_per_block for copy in match.copies}))
            for group, match in zip(self._geometry.groups, reading.matches, strict=True)
        )

    def _active(self, reading: _Reading) -> tuple[bool, bool]:
        """Whether the transport still writes answers, and pages, for a read."""
        parts, status = reading.parts, self._transport.status
        asks = [self._asks.status(part.ask) for part in parts if part.ask is not None]
        transfers = [status(part.transfer) for part in parts if part.transfer is not None]
        return ACTIVE in asks, ACTIVE in transfers

    def _finish(self, reading: _Reading) -> None:
        """Frees the resources of a read, none of them active."""
        for part in reading.parts:
            for give_back, taken in (
                (self._asks.drop, part.ask),
                (self._transport.finish, part.transfer),
            ):
                if taken is not None:
                    try:
                        give_back(taken)
                    except TransportError as error:
                        log.warning("read of %s: %s", reading.request, error)
        reading.peer.active -= 1

    def _free_pages(self, reading: _Reading) -> None:
        for page in reading.pages:
            del self._written[page]

    # ------------------------------------------------------------------ reports

    def take_ended(self) -> list[ReadResult]:
        """Reads that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def take_drained(self) -> list[str]:
        """Requests that ended in flight and have drained since the last call."""
        drained, self._drained = self._drained, []
        return drained

    def left(self) -> list[str]:
        """Requests that have ended, but not yet in the transport."""
        return [reading.request for reading in self._draining]


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Adds the rank to the transport's errors."""
    try:
        yield
    except TransportError as error:
        raise TransportError(f"rank {source.rank}: {error}") from error
