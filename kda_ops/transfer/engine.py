"""A rank's endpoint of all transfers: connections, reads, offers and their release.

One `TransferEngine` per rank, on either side. The reading side connects (a handshake with every
source rank, checked on both sides), then `read`s requests; the other side `offer`s them and keeps
their pages until every consumer has sent its notice or the offer expires. Nothing blocks: `poll`
advances everything, and every read ends within its timeout.

A read ends `done` only if its sources held the offer until its last byte had arrived: the protocol
is in `kda_ops.transfer.reads`.

The transport may still be writing the pages of a read that was cancelled, timed out or lost a
sibling: NIXL frees a running read without stopping it. Its result is `in_flight`, and its local
pages must not be reused before `poll` reports the request as `drained`.
"""

import logging
import time
import uuid
from collections.abc import Callable, Sequence

from torch import Tensor

from kda_ops.transfer.asks import Asks, Landing
from kda_ops.transfer.blocks import block_groups, held_blocks, match_blocks
from kda_ops.transfer.board import Board, blocks_digest
from kda_ops.transfer.geometry import EngineGeometry
from kda_ops.transfer.messages import Card, Hello
from kda_ops.transfer.offers import Offers
from kda_ops.transfer.pages import page_memory, page_regions
from kda_ops.transfer.peers import Call, Peers
from kda_ops.transfer.reads import Reads
from kda_ops.transfer.results import Counters, Progress, TransferError
from kda_ops.transfer.schema import take_name
from kda_ops.transfer.seal import check_secret
from kda_ops.transfer.transport import Transport, TransportError

Blocks = Sequence[Sequence[int]]
Running = int | Sequence[int | None] | None

log = logging.getLogger(__name__)

_unclosed: list["TransferEngine"] = []  # their memory may still be written, so it is never freed


class TransferEngine:
    """One rank's endpoint of all transfers.

    Args:
        transport: Not shared with another engine.
        geometry: Geometry of this engine, the same on every rank.
        rank: Tensor-parallel rank in `[0, geometry.tp_size)`.
        pages: Per group and layer, uint8 `[pages, page_bytes]`: the bytes of the pages, rows
            without gaps, all on the CPU or all on CUDA devices. `buffer_pages` makes them from a
            state.
        name: Name of the engine, the same on every rank. Must change when an engine restarts. None
            generates one, for an engine of one rank.
        timeout_s: Timeout of a read, and the default time to live of an offer.
        clock: A monotonic clock in seconds.
        secret: Shared by all engines that may connect, at least 16 bytes: authenticates handshakes
            (without encryption). If empty, anyone who can send a handshake is trusted. Every field
            is checked except the transport's own metadata, which NIXL 1.5 does not parse safely: go
            without a secret only on a trusted network.

    Raises:
        ValueError: A rank or pages that do not fit the geometry; a secret that is too short.
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
        self._clock = clock
        board, landing = Board(), Landing()
        regions, memory = page_regions(geometry, pages), page_memory(pages)
        self._registrations = []
        try:
            for registered, kind in (
                ([r for layers in regions for r in layers], memory),
                ([board.region, landing.region], "cpu"),
            ):
                self._registrations.append(transport.register(registered, kind))
            metadata = transport.metadata()
        except TransportError:
            for registration in self._registrations:
                transport.deregister(registration)
            raise
        card = Card(self.name, rank, geometry, metadata, memory, regions, board.region)
        self._offers = Offers(card, board, self.counters, secret)
        hello = Hello(self.name, rank, transport.name, geometry)
        self._peers = Peers(transport, hello, regions, memory, landing.region, secret)
        self._reads = Reads(
            transport,
            geometry,
            pages,
            self._peers,
            self.counters,
            Asks(transport, landing, self.counters),
            clock,
            (self.name, rank),
        )
        self._closed = False

    # ------------------------------------------------------------------ connecting

    def answer(self, message: bytes) -> bytes:
        """The answer to a reader's handshake: this rank's description, or an error.

        May be called from a different thread than everything else.

        Args:
            message: From an untrusted peer.
        """
        return self._offers.answer(message)

    def connect(self, engine: str, tp_size: int, call: Call) -> None:
        """Prepares reads from an engine; does nothing if it is connected.

        Args:
            engine: The name of the engine.
            tp_size: Its ranks.
            call: Sends a handshake to one of its ranks and returns the answer, with its own
                timeout.

        Raises:
            ValueError: The engines are incompatible (`GeometryError`), or an answer is malformed.
            TransferError: A rank cannot be reached.
        """
        if self._closed:
            raise TransferError("the engine is closed")
        if engine not in self._peers:
            self._peers.connect(engine, tp_size, call)
            self.counters.handshakes += 1

    def disconnect(self, engine: str) -> None:
        """Disconnects an engine, once its running reads have ended."""
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
        local_running: Running = None,
        remote_running: Running = None,
        timeout_s: float | None = None,
    ) -> None:
        """Starts reading a request's pages. `poll` reports the end.

        It fails unless every rank it reads from holds an offer of the request, of these remote
        blocks if the offer names any, from before the first byte until after the last one. When all
        reads are done every source rank gets a notice, even if nothing had to be read (a full
        prefix hit). A failed read sends none, and `ReadResult.spoiled` names the blocks whose
        contents are now undefined.

        Args:
            request: Its id on the other engine.
            engine: A connected engine.
            local: Block ids to fill, per group; see `match_blocks`.
            remote: Block ids of the whole request on the other engine, per group, as it offers
                them.
            computed: See `match_blocks`.
            local_running: Likewise.
            remote_running: Likewise.
            timeout_s: None means the engine's own. More than the offer's time to live is useless
                unless the offer is renewed.

        Raises:
            ValueError: Blocks that do not match, do not exist, are on offer themselves or may still
                be written by another read; a request that is being or has been read. Nothing was
                read.
            TransferError: The engine is not connected.
        """
        take_name("request", request)
        if engine not in self._peers:
            raise TransferError(f"engine {engine} is not connected")
        self._reads.check_request(request, engine)
        peer = self._peers[engine]
        matches = match_blocks(
            local,
            remote,
            block_groups(self.geometry, peer.geometry),
            computed=computed,
            local_running=local_running,
            remote_running=remote_running,
        )
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
        self._reads.check_unwritten("local", pages)
        self._offers.check_not_offered(pages)
        blocks = blocks_digest(held_blocks("remote", remote, peer.geometry, remote_running))
        limit = self.timeout_s if timeout_s is None else timeout_s
        self._reads.start(request, peer, matches, pages, blocks, limit)

    def cancel(self, request: str) -> None:
        """Ends a read. Its result comes with the next `poll`.

        Raises:
            ValueError: No such read is running.
        """
        self._reads.cancel(request)

    def poll(self) -> Progress:
        """Advances everything, without waiting.

        Ends expired offers: until that is reported, their pages must not change. On a GPU, tokens
        that no remote page covers are zeroed on the current stream.
        """
        self._reads.advance()
        try:
            self._offers.count(self.transport.notices())
        except TransportError as error:
            log.warning("no notices: %s", error)
        self._offers.expire(self._clock())
        self._peers.drop_idle()
        return Progress(
            self._reads.take_ended(), self._offers.take_released(), self._reads.take_drained()
        )

    # ------------------------------------------------------------------ offering

    def offer(
        self,
        request: str,
        blocks: Blocks | None = None,
        *,
        running: Running = None,
        ttl_s: float | None = None,
    ) -> None:
        """Promises that a request's pages stay unchanged until `poll` releases them.

        They are read regardless of GPU streams: all writes to them must have completed.

        Args:
            request: An id. Readers learn its blocks by other means, and not before this returns.
            blocks: The request's block ids, per group, as told to readers. Reads of other blocks
                under this id fail, such as those of an earlier offer. With None that is up to the
                caller's ids: then an id is offered only once.
            running: Index of the running block in lists of states, as in `match_blocks`.
            ttl_s: Seconds until the offer expires without notices; None means the engine's timeout.

        Raises:
            ValueError: The request is already offered, was offered before and has no blocks now, or
                is not a printable string; blocks that do not exist or may still be written by a
                read.
            TransferError: There are too many offers.
        """
        take_name("request", request)
        limit = self.timeout_s if ttl_s is None else ttl_s
        held = None if blocks is None else held_blocks("offered", blocks, self.geometry, running)
        pages = set()
        for i, (group, own) in enumerate(zip(self.geometry.groups, held or (), strict=False)):
            ratio = group.pages_per_block
            found = [block * ratio + part for block in own for part in range(ratio)]
            _check_range(f"offered group {i}", found, group.pages)
            pages |= {(i, page) for page in found}
        self._reads.check_unwritten("offered", pages)
        self._offers.offer(request, held, pages, self._clock() + limit)

    def renew(self, request: str, ttl_s: float | None = None) -> None:
        """Extends or shortens an offer.

        Args:
            request: Its id.
            ttl_s: Seconds from now; None means the engine's timeout.

        Raises:
            ValueError: It is not offered, or no longer.
        """
        limit = self.timeout_s if ttl_s is None else ttl_s
        self._offers.renew(request, self._clock() + limit)

    def withdraw(self, request: str) -> None:
        """Ends an offer early: its reads fail. Its pages are free when `poll` reports it.

        Raises:
            ValueError: It is not offered.
        """
        self._offers.withdraw(request)

    def close(self, *, timeout_s: float | None = None) -> list[str]:
        """Cancels running reads, ends all offers, frees everything and leaves the network.

        Args:
            timeout_s: How long to wait for reads in flight; None means the engine's timeout.

        Returns:
            Requests whose reads did not end: their pages may still be written and stay registered.
        """
        if self._closed:
            return []
        self._closed = True
        self._offers.withdraw_all()
        self._reads.cancel_all()
        limit = self._clock() + (self.timeout_s if timeout_s is None else timeout_s)
        self.poll()
        while self._reads.left() and self._clock() < limit:
            time.sleep(0.001)
            self.poll()
        self._peers.disconnect_all()
        left = self._reads.left()
        if left:
            _unclosed.append(self)
            return left
        for registration in self._registrations:
            try:
                self.transport.deregister(registration)
            except TransportError as error:
                log.warning("close: %s", error)
        self.transport.close()
        return left


def _check_range(name: str, pages: list[int], count: int) -> None:
    for page in pages:
        if not 0 <= page < count:
            raise ValueError(f"{name} must hold pages in [0, {count}), got {page}")
