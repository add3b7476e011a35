"""Reads of a request's pages from the ranks of another engine, and their release.

One `TransferEngine` per rank, on either side. The reading side connects (a handshake with every
source rank, checked on both sides), then `read`s requests; the other side `offer`s them and keeps
their pages until every consumer has sent its notice or a time to live has passed. Nothing blocks:
`poll` moves everything on, and every read ends within its timeout.

A read that is cancelled, timed out or lost a sibling may still be written by the transport: NIXL
frees a running read without stopping it. Its result says `in_flight`, and its local pages must not
be used again before `poll` reports the request as `drained`.
"""

import base64
import binascii
import json
import logging
import math
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kda_ops.transfer.blocks import GroupMatch, block_groups, match_blocks
from kda_ops.transfer.geometry import (
    VERSION,
    EngineGeometry,
    GeometryError,
    check_compatible,
    decode_geometry,
    decode_json,
    encode_geometry,
    take_count,
    take_fields,
    take_list,
    take_name,
)
from kda_ops.transfer.plan import Granules, consumer_ranks, plan_granules, plan_zero, source_ranks
from kda_ops.transfer.transport import (
    ACTIVE,
    DONE,
    Ranges,
    Region,
    Transport,
    TransportError,
)

MAX_HANDSHAKE = 16 << 20
MAX_NOTICE = 4096
REMEMBERED = 65536

Call = Callable[[int, bytes], bytes]
Blocks = Sequence[Sequence[int]]

log = logging.getLogger(__name__)


class TransferError(RuntimeError):
    """A connection or read that failed, not for a mistake in its arguments."""


class ReadResult(NamedTuple):
    """How a read ended.

    Attributes:
        request: Its id.
        outcome: `"done"`, `"failed"`, `"timeout"` or `"cancelled"`.
        error: What went wrong, empty for `"done"`.
        in_flight: The transport may still write the request's local pages; see `Progress.drained`.
        seconds: From `read` to the end.
    """

    request: str
    outcome: str
    error: str
    in_flight: bool
    seconds: float


class Release(NamedTuple):
    """Pages of an offered request may be used again.

    Attributes:
        request: Its id.
        outcome: `"done"` when all consumers sent their notice, `"expired"` when they did not in
            time, `"withdrawn"` when the owner took it back.
    """

    request: str
    outcome: str


class Progress(NamedTuple):
    """What has ended since the last `poll`.

    Attributes:
        finished: Reads of this rank.
        released: Requests that this rank offered.
        drained: Requests whose reads ended `in_flight` and are now over.
    """

    finished: list[ReadResult]
    released: list[Release]
    drained: list[str]


@dataclass
class Counters:
    """What an engine has done.

    Attributes:
        handshakes: Answered as a source, completed as a reader.
        refused: Handshakes that were answered with an error.
        reads: Reads given to the transport; one per source rank and request.
        ranges: Ranges in them.
        bytes: Bytes that have come, per `group.segment`.
        outcomes: Requests read, by outcome.
        releases: Offers, by outcome.
        stray_notices: Notices that were malformed or of nothing on offer.
        latency: Requests that were read, by `ceil(log2(milliseconds))`.
    """

    handshakes: int = 0
    refused: int = 0
    reads: int = 0
    ranges: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    releases: Counter[str] = field(default_factory=Counter)
    stray_notices: int = 0
    latency: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class _Source:
    """One source rank as a reader knows it."""

    rank: int
    agent: str
    local: Any
    remote: Any
    groups: list["_Rows"]


@dataclass(eq=False)
class _Rows:
    """Where a group's ranges lie in the two prepared lists of a source."""

    local: np.ndarray
    remote: np.ndarray
    plan: Granules
    tokens: int


@dataclass(eq=False)
class _Remote:
    """A connected engine."""

    name: str
    geometry: EngineGeometry
    sources: list[_Source]
    active: int = 0


@dataclass(eq=False)
class _Reading:
    request: str
    remote: _Remote
    matches: list[GroupMatch]
    pages: set[tuple[int, int]]
    transfers: list[Any]
    started: float
    deadline: float
    bytes: Counter[str]


@dataclass(eq=False)
class _Offer:
    expires: float
    noticed: dict[str, set[int]] = field(default_factory=dict)


class TransferEngine:
    """One rank's end of all transfers.

    Args:
        transport: Not shared with another engine.
        geometry: Of this engine; every rank has the same.
        rank: Tensor-parallel rank in `[0, geometry.tp_size)`.
        pages: Per group and layer, uint8 `[pages, page_bytes]`: the bytes of the pages, rows
            without gaps. `buffer_pages` makes them from a state.
        name: Of the engine, the same on every rank. Must change when an engine restarts. None
            makes one, for an engine of one rank.
        timeout_s: Of a read, and the default time to live of an offer.
        clock: Seconds that never go back.

    Raises:
        ValueError: A rank, or pages, that do not fit the geometry.
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
    ) -> None:
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
        self._regions = _check_pages(geometry, pages)
        self._registration = transport.register([r for layer in self._regions for r in layer])
        self._card = self._describe()
        self._remotes: dict[str, _Remote] = {}
        self._closing: list[_Remote] = []
        self._readings: dict[str, _Reading] = {}
        self._draining: list[_Reading] = []
        self._written: dict[tuple[int, int], str] = {}
        self._ended: list[ReadResult] = []
        self._read_before: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._offers: dict[str, _Offer] = {}
        self._released: list[Release] = []
        self._consumers: dict[str, tuple[int, dict[int, str]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    # ------------------------------------------------------------------ handshake

    def _describe(self) -> bytes:
        """This rank as its handshake answer says it."""
        return json.dumps(
            {
                "version": VERSION,
                "engine": self.name,
                "rank": self.rank,
                "geometry": encode_geometry(self.geometry),
                "agent": base64.b64encode(self.transport.metadata()).decode(),
                "regions": [[list(region) for region in layers] for layers in self._regions],
            }
        ).encode()

    def answer(self, message: bytes) -> bytes:
        """The answer to a reader's handshake: this rank's description, or an error.

        May be called from another thread than everything else.

        Args:
            message: From a peer, not trusted.
        """
        try:
            reader = take_fields("handshake", decode_json(message, limit=MAX_HANDSHAKE), _HELLO)
            _check_version(reader["version"])
            if reader["engine"] == self.name:
                raise GeometryError(f"engine of handshake must not be the own one, {self.name!r}")
            geometry = decode_geometry(reader["geometry"])
            if reader["rank"] >= geometry.tp_size:
                raise GeometryError(
                    f"rank of handshake must be below {geometry.tp_size}, got {reader['rank']}"
                )
            check_compatible(self.geometry, geometry)
            sources = source_ranks(self.geometry.tp_size, geometry.tp_size, reader["rank"])
            if self.rank not in sources:
                raise GeometryError(
                    f"rank {reader['rank']} of {geometry.tp_size} must read from ranks "
                    f"{list(sources)}, got {self.rank}"
                )
        except ValueError as error:
            self.counters.refused += 1
            log.warning("refused a handshake: %s", error)
            return json.dumps({"version": VERSION, "error": str(error)[:1000]}).encode()
        with self._lock:
            agents = self._consumers.pop(reader["engine"], (0, {}))[1]
            agents[reader["rank"]] = reader["agent"]
            self._consumers[reader["engine"]] = (geometry.tp_size, agents)
            while len(self._consumers) > REMEMBERED:
                self._consumers.pop(next(iter(self._consumers)))
        self.counters.handshakes += 1
        return self._card

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
        if engine in self._remotes:
            return
        hello = json.dumps(
            {
                "version": VERSION,
                "engine": self.name,
                "rank": self.rank,
                "agent": self.transport.name,
                "geometry": encode_geometry(self.geometry),
            }
        ).encode()
        sources: list[_Source] = []
        geometries: list[EngineGeometry] = []
        try:
            for rank in source_ranks(tp_size, self.geometry.tp_size, self.rank):
                card = self._read_card(call(rank, hello), engine, rank, tp_size)
                geometries.append(card["geometry"])
                if geometries[0] != geometries[-1]:
                    raise GeometryError(f"geometry of rank {rank} must be that of the ranks before")
                sources.append(self._prepare(rank, card))
        except (OSError, TransportError) as error:
            self._drop(sources)
            raise TransferError(f"engine {engine} cannot be reached: {error}") from error
        except BaseException:
            self._drop(sources)
            raise
        self._remotes[engine] = _Remote(engine, geometries[0], sources)
        self.counters.handshakes += 1
        log.info("connected to engine %s, ranks %s", engine, [s.rank for s in sources])

    def _read_card(self, answer: bytes, engine: str, rank: int, tp_size: int) -> dict[str, Any]:
        """A checked description of a source rank."""
        value = decode_json(answer, limit=MAX_HANDSHAKE)
        if isinstance(value, dict) and "error" in value:
            raise GeometryError(f"rank {rank} refused: {str(value['error'])[:1000]}")
        card = take_fields("answer", value, _CARD)
        _check_version(card["version"])
        for name, expected in (("engine", engine), ("rank", rank)):
            if card[name] != expected:
                raise GeometryError(f"{name} of answer must be {expected!r}, got {card[name]!r}")
        card["geometry"] = geometry = decode_geometry(card["geometry"])
        if geometry.tp_size != tp_size:
            raise GeometryError(f"tp_size of answer must be {tp_size}, got {geometry.tp_size}")
        check_compatible(self.geometry, geometry)
        card["regions"] = _take_regions(geometry, card["regions"])
        try:
            card["agent"] = base64.b64decode(card["agent"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise GeometryError(f"agent of answer must be base64, got {error}") from None
        return card

    def _prepare(self, rank: int, card: dict[str, Any]) -> _Source:
        """Prepared lists of every range that this rank may ever read from a source rank."""
        ours: list[Ranges] = []
        theirs: list[Ranges] = []
        groups = []
        rows_of_ours = rows_of_theirs = 0
        for i, (own, other) in enumerate(
            zip(self.geometry.groups, card["geometry"].groups, strict=True)
        ):
            plan = plan_granules(other, own, self.rank)
            chosen = [j for j, read in enumerate(plan.reads) if read.src_rank == rank]
            plan = plan._replace(
                reads=[plan.reads[j] for j in chosen], steps=[plan.steps[j] for j in chosen]
            )
            starts = []
            for layer in range(own.layers):
                to, source = self._regions[i][layer], card["regions"][i][layer]
                for read, step in zip(plan.reads, plan.steps, strict=True):
                    starts.append((rows_of_ours, rows_of_theirs))
                    ours += _ranges(to, own, read.dst_offset, read.nbytes, step, plan.dst_per_page)
                    theirs += _ranges(
                        source, other, read.src_offset, read.nbytes, step, plan.src_per_page
                    )
                    rows_of_ours += own.pages * plan.dst_per_page
                    rows_of_theirs += other.pages * plan.src_per_page
            rows = np.array(starts, np.int64).reshape(-1, 2)
            tokens = own.page_tokens // plan.dst_per_page
            groups.append(_Rows(rows[:, 0], rows[:, 1], plan, tokens))
        agent = self.transport.add_peer(card["agent"])
        source = _Source(rank, agent, None, None, groups)
        if ours:
            try:
                source.local = self.transport.prepare(None, ours)
                source.remote = self.transport.prepare(agent, theirs)
            except BaseException:
                self._drop([source])
                raise
        return source

    def _drop(self, sources: list[_Source]) -> None:
        """Gives back what `_prepare` took."""
        for source in sources:
            for release, handle in (
                (self.transport.release, source.local),
                (self.transport.release, source.remote),
                (self.transport.remove_peer, source.agent),
            ):
                if handle is not None:
                    try:
                        release(handle)
                    except TransportError as error:
                        log.warning("rank %d: %s", source.rank, error)

    def disconnect(self, engine: str) -> None:
        """Forgets an engine; reads that are running end first."""
        remote = self._remotes.pop(engine, None)
        if remote is not None:
            self._closing.append(remote)
            self._close_remotes()

    def _close_remotes(self) -> None:
        for remote in [r for r in self._closing if r.active == 0]:
            self._closing.remove(remote)
            self._drop(remote.sources)

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
        if engine not in self._remotes:
            raise TransferError(f"engine {engine} is not connected")
        if request in self._readings or any(r.request == request for r in self._draining):
            raise ValueError(f"request must not be read twice at once, got {request!r}")
        if (engine, request) in self._read_before:
            raise ValueError(f"request must not be read again after its notice, got {request!r}")
        peer = self._remotes[engine]
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
            self._lose(peer)
            self._end(reading, "failed", f"rank {source.rank}: {error}")

    def _post(self, source: _Source, reading: _Reading) -> None:
        """One transport read for everything that a request needs of one rank."""
        ours, theirs = [], []
        for group, geometry, other, match in zip(
            source.groups,
            self.geometry.groups,
            reading.remote.geometry.groups,
            reading.matches,
            strict=True,
        ):
            to, at = _indices(match, group, geometry.pages, other.pages)
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
        """Moves everything on, without waiting."""
        now = self._clock()
        for reading in list(self._readings.values()):
            states = self._states(reading)
            if all(state == DONE for state in states):
                self._complete(reading)
            elif any(state not in (ACTIVE, DONE) for state in states):
                self._lose(reading.remote)
                self._end(reading, "failed", f"engine {reading.remote.name}: a read failed")
            elif now >= reading.deadline:
                seconds = reading.deadline - reading.started
                self._end(reading, "timeout", f"not done within {seconds:g} s")
        drained = []
        for reading in list(self._draining):
            if ACTIVE not in self._states(reading):
                self._draining.remove(reading)
                self._finish(reading)
                drained.append(reading.request)
        self._count_notices()
        self._expire(now)
        self._close_remotes()
        ended, self._ended = self._ended, []
        released, self._released = self._released, []
        return Progress(ended, released, drained)

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
        self._read_before[reading.remote.name, reading.request] = None
        while len(self._read_before) > REMEMBERED:
            self._read_before.popitem(last=False)
        notice = json.dumps(
            {
                "version": VERSION,
                "engine": self.name,
                "rank": self.rank,
                "request": reading.request,
            }
        ).encode()
        for source in reading.remote.sources:
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
        reading.remote.active -= 1
        for page in reading.pages:
            del self._written[page]

    def _lose(self, remote: _Remote) -> None:
        """After a failed read an engine has to be connected again."""
        if self._remotes.get(remote.name) is remote:
            self.disconnect(remote.name)

    # ------------------------------------------------------------------ offering

    def offer(self, request: str, *, ttl_s: float | None = None) -> None:
        """Promises that a request's pages stay as they are until `poll` releases them.

        Args:
            request: An id; what its blocks are is told to the reader by other means.
            ttl_s: Seconds until the promise ends without notices; None means the engine's timeout.

        Raises:
            ValueError: The request is offered already.
        """
        take_name("request", request)
        if request in self._offers:
            raise ValueError(f"request must not be offered twice, got {request!r}")
        limit = self.timeout_s if ttl_s is None else ttl_s
        self._offers[request] = _Offer(self._clock() + limit)

    def withdraw(self, request: str) -> None:
        """Ends an offer early. The caller knows that nobody reads it.

        Raises:
            ValueError: It is not offered.
        """
        if request not in self._offers:
            raise ValueError(f"request must be offered, got {request!r}")
        self._release(request, "withdrawn")

    def _count_notices(self) -> None:
        for agent, message in self.transport.notices():
            try:
                notice = take_fields("notice", decode_json(message, limit=MAX_NOTICE), _NOTICE)
                _check_version(notice["version"])
                with self._lock:
                    tp_size, agents = self._consumers.get(notice["engine"], (0, {}))
                    known = agents.get(notice["rank"]) == agent
                offer = self._offers.get(notice["request"])
                if not known or offer is None:
                    raise GeometryError(f"nothing is offered to it as {notice['request']!r}")
                expected = consumer_ranks(self.geometry.tp_size, tp_size, self.rank)
            except ValueError as error:
                self.counters.stray_notices += 1
                log.warning("stray notice of %s: %s", agent, error)
                continue
            ranks = offer.noticed.setdefault(notice["engine"], set())
            ranks.add(notice["rank"])
            if len(ranks) == len(expected):
                self._release(notice["request"], "done")

    def _expire(self, now: float) -> None:
        for request in [r for r, offer in self._offers.items() if now >= offer.expires]:
            log.warning("offer of %s expired", request)
            self._release(request, "expired")

    def _release(self, request: str, outcome: str) -> None:
        del self._offers[request]
        self.counters.releases[outcome] += 1
        self._released.append(Release(request, outcome))

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
        for engine in list(self._remotes):
            self.disconnect(engine)
        left = [reading.request for reading in self._draining]
        if not left:
            try:
                self.transport.deregister(self._registration)
            except TransportError as error:
                log.warning("close: %s", error)
            self.transport.close()
        return left


def buffer_pages(state: Tensor, page_bytes: int) -> list[Tensor]:
    """The pages of a state as bytes, one `[slots, page_bytes]` per layer.

    Args:
        state: `conv` as `KDAStateSpec.allocate` makes it with `layers`, the first view of its
            buffer.
        page_bytes: Of the spec.

    Raises:
        ValueError: The state does not begin its buffer, or the buffer is shorter than its pages.
    """
    layers, slots = state.shape[:2]
    storage = state.untyped_storage()
    if state.storage_offset() != 0 or storage.nbytes() < layers * slots * page_bytes:
        raise ValueError(
            f"state must begin a buffer of at least {layers * slots * page_bytes} bytes, got "
            f"offset {state.storage_offset()} in {storage.nbytes()} bytes"
        )
    whole = torch.empty(0, dtype=torch.uint8, device=state.device)
    whole.set_(storage, 0, (layers, slots, page_bytes))
    return list(whole.unbind(0))


def _check_pages(geometry: EngineGeometry, pages: Sequence[Sequence[Tensor]]) -> list[list[Region]]:
    """Own pages as regions."""
    if len(pages) != len(geometry.groups):
        raise ValueError(f"pages must have {len(geometry.groups)} groups, got {len(pages)}")
    regions = []
    for group, layers in zip(geometry.groups, pages, strict=True):
        where = f"pages of group {group.name}"
        if len(layers) != group.layers:
            raise ValueError(f"{where} must have {group.layers} layers, got {len(layers)}")
        for x in layers:
            if x.dtype != torch.uint8 or tuple(x.shape) != (group.pages, group.page_bytes):
                raise ValueError(
                    f"{where} must be uint8 {[group.pages, group.page_bytes]}, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if not x.is_contiguous():
                raise ValueError(f"{where} must have no gaps, got strides {x.stride()}")
        regions.append([Region(x.data_ptr(), x.numel(), max(x.get_device(), 0)) for x in layers])
    return regions


def _take_regions(geometry: EngineGeometry, value: Any) -> list[list[Region]]:
    """Regions of a peer, long enough for what it says to have."""
    value = take_list("regions", value)
    if len(value) != len(geometry.groups):
        raise GeometryError(f"regions must have {len(geometry.groups)} groups, got {len(value)}")
    regions = []
    for group, layers in zip(geometry.groups, value, strict=True):
        layers = take_list(f"regions of group {group.name}", layers)
        if len(layers) != group.layers:
            raise GeometryError(
                f"regions of group {group.name} must have {group.layers} layers, got {len(layers)}"
            )
        found = []
        for layer in layers:
            numbers = take_list("region", layer)
            if len(numbers) != 3 or any(type(n) is not int or n < 0 for n in numbers):
                raise GeometryError(f"region must be address, bytes, device, got {layer!r:.80}")
            address, nbytes, _ = numbers
            if nbytes < group.pages * group.page_bytes or address + nbytes >= 1 << 64:
                raise GeometryError(
                    f"region of group {group.name} must have at least "
                    f"{group.pages * group.page_bytes} bytes, got {nbytes} at {address}"
                )
            found.append(Region(*numbers))
        regions.append(found)
    return regions


def _ranges(
    region: Region, geometry: Any, offset: int, nbytes: int, step: int, granules: int
) -> list[Ranges]:
    """One range per page, granule by granule."""
    return [
        Ranges(
            region.address + offset + granule * step,
            nbytes,
            region.device,
            geometry.page_bytes,
            geometry.pages,
        )
        for granule in range(granules)
    ]


def _indices(
    match: GroupMatch, group: _Rows, pages: int, remote_pages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Granules of a match as offsets from the start of a row of ranges, on both sides."""
    if group.plan.src_per_page == group.plan.dst_per_page == 1:
        both = [(c.local_page, c.remote_page) for c in match.copies]
    else:
        both = [
            (
                (copy.local_token + t) // group.tokens * pages + copy.local_page,
                (copy.remote_token + t) // group.tokens * remote_pages + copy.remote_page,
            )
            for copy in match.copies
            for t in range(0, copy.tokens, group.tokens)
        ]
    found = np.array(both, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _check_range(name: str, pages: list[int], count: int) -> None:
    for page in pages:
        if not 0 <= page < count:
            raise ValueError(f"{name} must hold pages in [0, {count}), got {page}")


def _check_version(version: int) -> None:
    if version != VERSION:
        raise GeometryError(f"version must be {VERSION}, got {version}")


def _take_any(name: str, value: Any) -> Any:
    return value


def _take_text(name: str, value: Any) -> str:
    if type(value) is not str:
        raise GeometryError(f"{name} must be a string, got {type(value).__name__}")
    return value


_BOTH = {"version": take_count, "engine": take_name, "rank": take_count, "geometry": _take_any}
_HELLO = {**_BOTH, "agent": take_name}
_CARD = {**_BOTH, "agent": _take_text, "regions": _take_any}
_NOTICE = {"version": take_count, "engine": take_name, "rank": take_count, "request": take_name}
