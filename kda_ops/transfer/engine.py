"""Reads of a request's pages from the ranks of another engine, and their release.

One `TransferEngine` per rank, on either side. The reading side connects (a handshake with every
source rank, checked on both sides), then `read`s requests; the other side `offer`s them and keeps
their pages until every consumer has sent its notice or a time to live has passed. Nothing blocks:
`poll` moves everything on, and every read ends within its timeout.

A read that is cancelled, timed out or lost a sibling may still be written by the transport: NIXL
frees a running read without stopping it. Its result says `in_flight`, and its local pages must not
be used again before `poll` reports the request as `drained`.
"""

import logging
import math
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kda_ops.transfer.blocks import GroupMatch, block_groups, match_blocks
from kda_ops.transfer.geometry import EngineGeometry
from kda_ops.transfer.messages import Card, Hello, Notice, encode_notice
from kda_ops.transfer.offers import Offers
from kda_ops.transfer.pages import page_memory, page_regions
from kda_ops.transfer.peers import Call, Peer, Peers, Source
from kda_ops.transfer.plan import plan_zero
from kda_ops.transfer.results import Counters, Progress, ReadResult, TransferError
from kda_ops.transfer.schema import take_name
from kda_ops.transfer.seal import check_secret
from kda_ops.transfer.transport import ACTIVE, DONE, Transport, TransportError

REMEMBERED_REQUESTS = 65536

Blocks = Sequence[Sequence[int]]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Reading:
    request: str
    peer: Peer
    matches: list[GroupMatch]
    pages: set[tuple[int, int]]
    transfers: list[Any]
    started: float
    deadline: float
    bytes: Counter[str]


class TransferEngine:
    """One rank's end of all transfers.

    Args:
        transport: Not shared with another engine.
        geometry: Of this engine; every rank has the same.
        rank: Tensor-parallel rank in `[0, geometry.tp_size)`.
        pages: Per group and layer, uint8 `[pages, page_bytes]`: the bytes of the pages, rows
            without gaps, all on the CPU or all on CUDA devices. `buffer_pages` makes them from a
            state.
        name: Of the engine, the same on every rank. Must change when an engine restarts. None
            makes one, for an engine of one rank.
        timeout_s: Of a read, and the default time to live of an offer.
        clock: Seconds that never go back.
        secret: Shared by all engines that may meet, 16 bytes or more: handshakes are sealed with it
            (not encrypted). Empty, whoever reaches a handshake is believed. Every field is checked
            but for the transport's own metadata, and NIXL 1.5 does not survive all bytes of those:
            let only a network that you trust do without a secret.

    Raises:
        ValueError: A rank, or pages, that do not fit the geometry; a secret that is too short.
        TransportError: The transport cannot register the pages. Nothing stays registered.
    """

    def __init__(
        self,
        transport: Transport,
        geometry: EngineGeometry,
        rank: int,
        pages: Sequence[Sequence[Tensor]],
        *,
        name: str | None = None,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        secret: bytes = b"",
    ) -> None:
        check_secret(secret)
        if not 0 <= rank < geometry.tp_size:
            raise ValueError(f"rank must be in [0, {geometry.tp_size}), got {rank}")
        self.transport = transport
        self.geometry = geometry
        self.rank = rank
        self.name = uuid.uuid4().hex if name is None else take_name("name", name)
        self.timeout_s = timeout_s
        self.counters = Counters()
        self._pages = pages
        self._clock = clock
        regions, memory = page_regions(geometry, pages), page_memory(pages)
        self._registration = transport.register([r for layers in regions for r in layers], memory)
        try:
            metadata = transport.metadata()
        except TransportError:
            transport.deregister(self._registration)
            raise
        card = Card(self.name, rank, geometry, metadata, memory, regions)
        self._offers = Offers(card, self.counters, secret)
        hello = Hello(self.name, rank, transport.name, geometry)
        self._peers = Peers(transport, hello, regions, memory, secret)
        self._readings: dict[str, _Reading] = {}
        self._draining: list[_Reading] = []
        self._written: dict[tuple[int, int], str] = {}
        self._ended: list[ReadResult] = []
        self._read_before: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._closed = False

    # ------------------------------------------------------------------ connecting

    def answer(self, message: bytes) -> bytes:
        """The answer to a reader's handshake: this rank's description, or an error.

        May be called from another thread than everything else.

        Args:
            message: From a peer, not trusted.
        """
        return self._offers.answer(message)

    def connect(self, engine: str, tp_size: int, call: Call) -> None:
        """Prepares reads from an engine; does nothing if it is connected.

        Args:
            engine: The name of the engine.
            tp_size: Its ranks.
            call: Sends a handshake to one of its ranks and returns the answer, within a time
                limit of its own.

        Raises:
            ValueError: The engines do not fit together (`GeometryError`), or an answer is
                malformed.
            TransferError: A rank cannot be reached.
        """
        if self._closed:
            raise TransferError("the engine is closed")
        if engine not in self._peers:
            self._peers.connect(engine, tp_size, call)
            self.counters.handshakes += 1

    def disconnect(self, engine: str) -> None:
        """Forgets an engine; reads that are running end first."""
        self._peers.disconnect(engine)

    # ------------------------------------------------------------------ reading

    def read(
        self,
        request: str,
        engine: str,
        local: Blocks,
        remote: Blocks,
        *,
        computed: int | Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Starts to read a request's pages. `poll` reports the end.

        When all reads are done every source rank gets a notice, also where nothing was to be read
        (a full prefix hit). A read that fails sends none.

        Args:
            request: Its id on the other engine.
            engine: A connected engine.
            local: Block ids to fill, per group; see `match_blocks`.
            remote: Block ids of the request on the other engine, per group.
            computed: See `match_blocks`.
            timeout_s: None means the engine's own. Choose it below the offer's time to live: pages
                of an expired offer may hold something else.

        Raises:
            ValueError: Blocks that do not match, do not exist or may still be written by another
                read, a request that is being read or has been read already. Nothing was read.
            TransferError: The engine is not connected.
        """
        take_name("request", request)
        if engine not in self._peers:
            raise TransferError(f"engine {engine} is not connected")
        if request in self._readings or any(r.request == request for r in self._draining):
            raise ValueError(f"request must not be read twice at once, got {request!r}")
        if (engine, request) in self._read_before:
            raise ValueError(f"request must not be read again after its notice, got {request!r}")
        peer = self._peers[engine]
        groups = block_groups(self.geometry, peer.geometry)
        matches = match_blocks(local, remote, groups, computed=computed)
        for i, (own, other, match) in enumerate(
            zip(self.geometry.groups, peer.geometry.groups, matches, strict=True)
        ):
            _check_range(f"local group {i}", [c.local_page for c in match.copies], own.pages)
            _check_range(f"local group {i}", [tail.page for tail in match.zero], own.pages)
            _check_range(f"remote group {i}", [c.remote_page for c in match.copies], other.pages)
            written = [(c.local_page, c.local_token) for c in match.copies]
            if len(set(written)) < len(written):
                raise ValueError(f"local group {i} must not repeat a block, got {list(local[i])}")
        pages = {
            (i, page)
            for i, match in enumerate(matches)
            for page in [*(c.local_page for c in match.copies), *(t.page for t in match.zero)]
        }
        taken = pages & self._written.keys()
        if taken:
            i, page = min(taken)
            raise ValueError(
                f"local group {i} must hold pages that no other read writes, got {page}, "
                f"which belongs to {self._written[i, page]!r}"
            )
        now = self._clock()
        limit = self.timeout_s if timeout_s is None else timeout_s
        reading = _Reading(request, peer, matches, pages, [], now, now + limit, Counter())
        self._written.update(dict.fromkeys(pages, request))
        self._readings[request] = reading
        peer.active += 1
        try:
            for source in peer.sources:
                self._post(source, reading)
        except TransportError as error:
            self._peers.lose(peer)
            self._end(reading, "failed", f"rank {source.rank}: {error}")

    def _post(self, source: Source, reading: _Reading) -> None:
        """One transport read for everything that a request needs of one rank."""
        ours, theirs = [], []
        for group, geometry, other, match in zip(
            source.groups,
            self.geometry.groups,
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
        if len(local) == 0:
            return
        handle = self.transport.read(source.local, local, source.remote, remote)
        reading.transfers.append(handle)
        self.counters.reads += 1
        self.counters.ranges += len(local)

    def cancel(self, request: str) -> None:
        """Ends a read. Its result comes with the next `poll`.

        Raises:
            ValueError: No such read is running.
        """
        if request not in self._readings:
            raise ValueError(f"request must be a running read, got {request!r}")
        self._end(self._readings[request], "cancelled", "cancelled")

    def poll(self) -> Progress:
        """Moves everything on, without waiting.

        On a GPU, tokens that no remote page covers are zeroed on the current stream.
        """
        now = self._clock()
        for reading in list(self._readings.values()):
            states = self._states(reading)
            if all(state == DONE for state in states):
                self._complete(reading)
            elif any(state not in (ACTIVE, DONE) for state in states):
                self._peers.lose(reading.peer)
                self._end(reading, "failed", f"engine {reading.peer.name}: a read failed")
            elif now >= reading.deadline:
                seconds = reading.deadline - reading.started
                self._end(reading, "timeout", f"not done within {seconds:g} s")
        drained = []
        for reading in list(self._draining):
            if ACTIVE not in self._states(reading):
                self._draining.remove(reading)
                self._finish(reading)
                drained.append(reading.request)
        try:
            self._offers.count(self.transport.notices())
        except TransportError as error:
            log.warning("no notices: %s", error)
        self._offers.expire(now)
        self._peers.drop_idle()
        ended, self._ended = self._ended, []
        return Progress(ended, self._offers.take_released(), drained)

    def _states(self, reading: _Reading) -> list[str]:
        return [self.transport.status(handle) for handle in reading.transfers]

    def _complete(self, reading: _Reading) -> None:
        """All bytes have come: zero what no remote page covered, tell every source rank."""
        for geometry, layers, match in zip(
            self.geometry.groups, self._pages, reading.matches, strict=True
        ):
            for tail in match.zero:
                for offset, nbytes in plan_zero(geometry, tail.first_token, tail.end_token):
                    for pages in layers:
                        pages[tail.page, offset : offset + nbytes] = 0
        self._read_before[reading.peer.name, reading.request] = None
        while len(self._read_before) > REMEMBERED_REQUESTS:
            self._read_before.popitem(last=False)
        notice = encode_notice(Notice(self.name, self.rank, reading.request))
        for source in reading.peer.sources:
            try:
                self.transport.notify(source.agent, notice)
            except TransportError as error:
                # the pages are here: the offer will expire on the other side
                log.warning("no notice to rank %d: %s", source.rank, error)
        self.counters.bytes.update(reading.bytes)
        milliseconds = (self._clock() - reading.started) * 1e3
        self.counters.latency[math.ceil(math.log2(max(milliseconds, 1e-3)))] += 1
        self._end(reading, "done", "")

    def _end(self, reading: _Reading, outcome: str, error: str) -> None:
        del self._readings[reading.request]
        in_flight = ACTIVE in self._states(reading)
        if in_flight:
            self._draining.append(reading)
        else:
            self._finish(reading)
        self.counters.outcomes[outcome] += 1
        if outcome != "done":
            log.warning("read of %s: %s, %s", reading.request, outcome, error)
        seconds = self._clock() - reading.started
        self._ended.append(ReadResult(reading.request, outcome, error, in_flight, seconds))

    def _finish(self, reading: _Reading) -> None:
        """Frees the reads of a request, none of them active."""
        for handle in reading.transfers:
            try:
                self.transport.finish(handle)
            except TransportError as error:
                log.warning("read of %s: %s", reading.request, error)
        reading.transfers = []
        reading.peer.active -= 1
        for page in reading.pages:
            del self._written[page]

    # ------------------------------------------------------------------ offering

    def offer(self, request: str, *, ttl_s: float | None = None) -> None:
        """Promises that a request's pages stay as they are until `poll` releases them.

        They are read without regard to a GPU's streams: what writes them must have ended.

        Args:
            request: An id; what its blocks are is told to the reader by other means.
            ttl_s: Seconds until the promise ends without notices; None means the engine's timeout.

        Raises:
            ValueError: The request is offered already, or is no printable string.
        """
        limit = self.timeout_s if ttl_s is None else ttl_s
        self._offers.offer(request, self._clock() + limit)

    def withdraw(self, request: str) -> None:
        """Ends an offer early. The caller knows that nobody reads it.

        Raises:
            ValueError: It is not offered.
        """
        self._offers.withdraw(request)

    def close(self, *, timeout_s: float | None = None) -> list[str]:
        """Cancels what runs, gives everything back, leaves the network.

        Args:
            timeout_s: How long to wait for reads in flight; None means the engine's timeout.

        Returns:
            Requests whose reads did not end: their pages may still be written, and stay
            registered.
        """
        if self._closed:
            return []
        self._closed = True
        for request in list(self._readings):
            self.cancel(request)
        limit = self._clock() + (self.timeout_s if timeout_s is None else timeout_s)
        self.poll()
        while self._draining and self._clock() < limit:
            time.sleep(0.001)
            self.poll()
        self._peers.disconnect_all()
        left = [reading.request for reading in self._draining]
        if not left:
            try:
                self.transport.deregister(self._registration)
            except TransportError as error:
                log.warning("close: %s", error)
            self.transport.close()
        return left


def _check_range(name: str, pages: list[int], count: int) -> None:
    for page in pages:
        if not 0 <= page < count:
            raise ValueError(f"{name} must hold pages in [0, {count}), got {page}")
