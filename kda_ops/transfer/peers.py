"""The engines that a rank reads from, with lists of ranges prepared once for each."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kda_ops.transfer.blocks import GroupMatch
from kda_ops.transfer.board import bucket_ranges
from kda_ops.transfer.geometry import EngineGeometry, PageGeometry, check_compatible
from kda_ops.transfer.messages import Card, Hello, decode_card, encode_hello
from kda_ops.transfer.plan import Granules, plan_granules, source_ranks
from kda_ops.transfer.results import TransferError
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.seal import seal, unseal
from kda_ops.transfer.transport import Ranges, Region, Transport, TransportError

Call = Callable[[int, bytes], bytes]

MAX_RANGES = 1 << 28  # per prepared list: its indices are int32, and a peer determines its length

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Rows:
    """A group's ranges in the two prepared lists of a source.

    Attributes:
        local: First index of every layer and read in the reader's list.
        remote: The same in the source's list.
        plan: The reads of one granule.
        tokens: Tokens of a granule.
    """

    local: np.ndarray
    remote: np.ndarray
    plan: Granules
    tokens: int

    def granules(
        self, match: GroupMatch, pages: int, remote_pages: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Granules of a match as offsets from the start of a row of ranges, on both sides.

        Args:
            match: Pages to copy.
            pages: Pages per layer of this rank.
            remote_pages: Pages per layer of the source.
        """
        if self.plan.src_per_page == self.plan.dst_per_page == 1:
            both = [(c.local_page, c.remote_page) for c in match.copies]
        else:
            both = [
                (
                    (copy.local_token + t) // self.tokens * pages + copy.local_page,
                    (copy.remote_token + t) // self.tokens * remote_pages + copy.remote_page,
                )
                for copy in match.copies
                for t in range(0, copy.tokens, self.tokens)
            ]
        found = np.array(both, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]


@dataclass(eq=False)
class Source:
    """One source rank from a reader's view: its transport's agent, prepared lists.

    Attributes:
        groups: Each group's ranges in `local` and `remote`, the lists of pages.
        landing: List of the reader's slots for buckets.
        board: List of the source's buckets.
    """

    rank: int
    agent: str
    groups: list[Rows]
    local: Any = None
    remote: Any = None
    landing: Any = None
    board: Any = None


@dataclass(eq=False)
class Peer:
    """A connected engine with `active` unfinished reads."""

    name: str
    geometry: EngineGeometry
    sources: list[Source]
    active: int = 0


class Peers:
    """Connects a rank to engines and disconnects it.

    Args:
        transport: The rank's transport.
        own: The rank's hello.
        regions: Its registered pages, per group and layer.
        memory: Their memory, `"cpu"` or `"cuda"`.
        landing: Landing area of the buckets it reads from boards.
        secret: The engine's secret.
    """

    def __init__(
        self,
        transport: Transport,
        own: Hello,
        regions: list[list[Region]],
        memory: str,
        landing: Region,
        secret: bytes,
    ) -> None:
        self._transport, self._own, self._secret = transport, own, secret
        self._regions, self._memory, self._landing = regions, memory, landing
        self._connected: dict[str, Peer] = {}
        self._closing: list[Peer] = []
        # an engine may be reconnected while reads of its first connection still run
        self._agents: Counter[str] = Counter()

    def __contains__(self, engine: str) -> bool:
        return engine in self._connected

    def __getitem__(self, engine: str) -> Peer:
        return self._connected[engine]

    def connect(self, engine: str, tp_size: int, call: Call) -> None:
        """See `TransferEngine.connect`."""
        hello = seal(self._secret, encode_hello(self._own))
        sources: list[Source] = []
        geometries: list[EngineGeometry] = []
        try:
            for rank in source_ranks(tp_size, self._own.geometry.tp_size, self._own.rank):
                answer = unseal(self._secret, call(rank, hello), hello)
                card = decode_card(answer, engine, rank)
                if card.geometry.tp_size != tp_size:
                    raise GeometryError(
                        f"tp_size of answer must be {tp_size}, got {card.geometry.tp_size}"
                    )
                check_compatible(self._own.geometry, card.geometry)
                geometries.append(card.geometry)
                if geometries[0] != geometries[-1]:
                    raise GeometryError(f"geometry of rank {rank} must be that of the ranks before")
                sources.append(self._prepare(card))
        except (OSError, TransportError) as error:
            self._drop(sources)
            raise TransferError(f"engine {engine} cannot be reached: {error}") from error
        except BaseException:
            self._drop(sources)
            raise
        self._connected[engine] = Peer(engine, geometries[0], sources)
        log.info("connected to engine %s, ranks %s", engine, [s.rank for s in sources])

    def _prepare(self, card: Card) -> Source:
        """Prepared lists of every range that this rank may ever read from a source rank."""
        ours: list[Ranges] = []
        theirs: list[Ranges] = []
        groups = []
        rows_of_ours = rows_of_theirs = 0
        for i, (own, other) in enumerate(
            zip(self._own.geometry.groups, card.geometry.groups, strict=True)
        ):
            plan = plan_granules(other, own, self._own.rank).of_rank(card.rank)
            rows = own.layers * len(plan.reads)
            for geometry, granules, before in (
                (own, plan.dst_per_page, rows_of_ours),
                (other, plan.src_per_page, rows_of_theirs),
            ):
                ranges = before + rows * geometry.pages * granules
                if ranges > MAX_RANGES:
                    raise GeometryError(
                        f"group {own.name}: pages must make at most {MAX_RANGES} ranges, "
                        f"got {ranges}"
                    )
            starts = []
            for layer in range(own.layers):
                to, at = self._regions[i][layer], card.regions[i][layer]
                for read, step in zip(plan.reads, plan.steps, strict=True):
                    starts.append((rows_of_ours, rows_of_theirs))
                    ours += _ranges(to, own, read.dst_offset, read.nbytes, step, plan.dst_per_page)
                    theirs += _ranges(
                        at, other, read.src_offset, read.nbytes, step, plan.src_per_page
                    )
                    rows_of_ours += own.pages * plan.dst_per_page
                    rows_of_theirs += other.pages * plan.src_per_page
            first = np.array(starts, np.int64).reshape(-1, 2)
            tokens = own.page_tokens // plan.dst_per_page
            groups.append(Rows(first[:, 0], first[:, 1], plan, tokens))
        agent = self._transport.add_peer(card.agent)
        self._agents[agent] += 1
        source = Source(card.rank, agent, groups)
        if ours:
            prepare = self._transport.prepare
            try:
                source.local = prepare(None, ours, self._memory)
                source.remote = prepare(agent, theirs, card.memory)
                source.landing = prepare(None, bucket_ranges(self._landing), "cpu")
                source.board = prepare(agent, bucket_ranges(card.board), "cpu")
            except BaseException:
                self._drop([source])
                raise
        return source

    def _drop(self, sources: list[Source]) -> None:
        """Frees what `_prepare` allocated."""
        for source in sources:
            self._agents[source.agent] -= 1
            last = self._agents[source.agent] == 0
            if last:
                del self._agents[source.agent]
            for release, handle in (
                (self._transport.release, source.local),
                (self._transport.release, source.remote),
                (self._transport.release, source.landing),
                (self._transport.release, source.board),
                (self._transport.remove_peer, source.agent if last else None),
            ):
                if handle is not None:
                    try:
                        release(handle)
                    except TransportError as error:
                        log.warning("rank %d: %s", source.rank, error)

    def disconnect(self, engine: str) -> None:
        """Disconnects an engine, and drops its lists once none of its reads is active."""
        peer = self._connected.pop(engine, None)
        if peer is not None:
            self._closing.append(peer)
            self.drop_idle()

    def lose(self, peer: Peer) -> None:
        """Disconnects an engine after a failed read; it must be connected again."""
        if self._connected.get(peer.name) is peer:
            self.disconnect(peer.name)

    def disconnect_all(self) -> None:
        """Disconnects all engines."""
        for engine in list(self._connected):
            self.disconnect(engine)

    def drop_idle(self) -> None:
        """Drops the lists of disconnected engines whose last read has ended."""
        for peer in [p for p in self._closing if p.active == 0]:
            self._closing.remove(peer)
            self._drop(peer.sources)


def _ranges(
    region: Region, geometry: PageGeometry, offset: int, nbytes: int, step: int, granules: int
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
