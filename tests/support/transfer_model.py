"""A simulation in which everything that can happen to an offer happens in any order.

Engines are real. Their transport, their clocks and the owner of the source's pages advance one step
at a time, chosen by a seed: reads copy their ranges in any order and in pieces, messages are late,
lost and repeated, offers expire, are renewed, withdrawn and repeated, free pages are overwritten.
"""

import ctypes
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kda_ops.cache.spec import Segment
from kda_ops.transfer.engine import TransferEngine
from kda_ops.transfer.geometry import EngineGeometry, PageGeometry, packed_geometry
from kda_ops.transfer.results import ReadResult
from kda_ops.transfer.transport import ACTIVE, DONE, InProcessNetwork, InProcessTransport

PAGES, UNITS, UNIT_BYTES, PIECES = 6, 4, 16, 3


class BrokenInvariantError(AssertionError):
    """A read ended `done` with bytes that its sources did not hold."""


def geometry(tp: int) -> EngineGeometry:
    """One group of states in one layer."""
    group: PageGeometry = packed_geometry(
        [Segment("s", UNITS, UNIT_BYTES)],
        name="state",
        kind="state",
        dtypes={"s": "int64"},
        tp_size=tp,
        pages=PAGES,
        block_tokens=16,
    )
    return EngineGeometry((group,))


@dataclass(eq=False)
class Stepped(InProcessTransport):
    """Reads move when `step` is called, messages are delivered by the world."""

    world: Any = None
    reads: list[Any] = field(default_factory=list)

    def read(self, *lists: Any) -> Any:
        read = super().read(*lists)
        rng: random.Random = self.world.rng
        read.pieces = []
        for (to, nbytes), (source, _) in read.pairs:
            cuts = sorted(rng.randrange(nbytes + 1) for _ in range(PIECES - 1))
            for start, end in zip([0, *cuts], [*cuts, nbytes], strict=True):
                if start < end:
                    read.pieces.append((to + start, source + start, end - start))
        rng.shuffle(read.pieces)
        self.reads.append(read)
        return read

    def status(self, read: Any) -> str:
        return read.state

    def finish(self, read: Any) -> None:
        super().finish(read)
        self.reads.remove(read)

    def step(self, read: Any) -> None:
        """Copies one piece; the read is done with the last one."""
        to, source, nbytes = read.pieces.pop()
        ctypes.memmove(to, source, nbytes)
        self.world.saw(self.name, to, read.peer.name)
        if not read.pieces:
            read.state = DONE

    def notify(self, peer: str, message: bytes) -> None:
        self.world.mail.append((self._peer(peer), self.name, message))
        self.world.notices[self.name, json.loads(message)["request"]] += 1


class Rank:
    """An engine of one rank, its clock and its page bytes as one int64 version per 8 bytes."""

    def __init__(self, world: "World", name: str, tp: int, rank: int) -> None:
        self.name, self.rank, self.now = name, rank, 0.0
        shape = geometry(tp)
        self.memory = torch.zeros(PAGES, shape.groups[0].page_bytes, dtype=torch.uint8)
        self.transport = Stepped(world.network, f"{name}{rank}", world=world)
        self.engine = TransferEngine(
            self.transport, shape, rank, [[self.memory]], name=name, clock=lambda: self.now
        )
        self.started: dict[str, tuple[int, np.ndarray]] = {}

    def page(self, page: int) -> np.ndarray:
        return self.memory.numpy()[page].view(np.int64)


@dataclass
class Promise:
    """The owner's promises that have not yet been released on all ranks."""

    name: str
    page: int
    version: int
    ranks: set[int]


class World:
    """A source engine of `p` ranks and two reading engines of `d`.

    Attributes:
        rng: Chooses everything.
        mail: Messages in flight.
        outcomes: Counts of how reads ended.
    """

    def __init__(self, seed: int, p: int, d: int) -> None:
        self.rng = random.Random(seed)
        self.network = InProcessNetwork()
        self.mail: list[tuple[Stepped, str, bytes]] = []
        self.sources = [Rank(self, "P", p, rank) for rank in range(p)]
        self.readers = [Rank(self, name, d, rank) for name in "DE" for rank in range(d)]
        for reader in self.readers:
            reader.engine.connect("P", p, lambda rank, m: self.sources[rank].engine.answer(m))
        self.versions = 0
        self.promises: dict[str, Promise] = {}
        self.told: list[tuple[str, int]] = []
        self.names = 0
        self.last_seen: dict[tuple[str, int, str], dict[str, int]] = {}
        self.outcomes: Counter[str] = Counter()
        self.notices: Counter[tuple[str, str]] = Counter()

    # ------------------------------------------------------------------ what is watched

    def saw(self, reader: str, to: int, source: str) -> None:
        """Which promises held when a byte of a source reached a page of a reader."""
        memory = next(r.memory for r in self.readers if r.transport.name == reader)
        page = (to - memory.data_ptr()) // memory.shape[1]
        rank = next(s.rank for s in self.sources if s.transport.name == source)
        if 0 <= page < PAGES:
            self.last_seen[reader, page, source] = {
                promise.name: promise.version
                for promise in self.promises.values()
                if rank in promise.ranks
            }

    def check_end(self, reader: Rank, result: ReadResult) -> None:
        page, before = reader.started.pop(result.request)
        self.outcomes[result.outcome] += 1
        found = reader.page(page)
        sources = self.sources_of(reader)
        sent = self.notices[reader.transport.name, result.request]
        if sent != (len(sources) if result.outcome == "done" else 0):
            raise BrokenInvariantError(f"{result} sent {sent} notices")
        if result.outcome != "done":
            if page not in result.spoiled[0] and not (found == before).all():
                raise BrokenInvariantError(f"{result} wrote page {page}")
            return
        versions = set(found.tolist())
        for source in sources:
            key = (reader.transport.name, page, source.transport.name)
            held = self.last_seen[key].get(result.request)
            if versions != {held}:
                raise BrokenInvariantError(f"{result} has {versions}, {key[2]} held {held}")

    def sources_of(self, reader: Rank) -> list[Rank]:
        peer = reader.engine._peers["P"]
        return [self.sources[source.rank] for source in peer.sources]

    # ------------------------------------------------------------------ what may happen

    def free_pages(self) -> list[int]:
        taken = {promise.page for promise in self.promises.values()}
        return [page for page in range(1, PAGES) if page not in taken]

    def write(self, page: int) -> int:
        """The owner overwrites a free page on every rank."""
        self.versions += 1
        for source in self.sources:
            source.page(page)[:] = self.versions
        return self.versions

    def overwrite(self) -> None:
        if pages := self.free_pages():
            self.write(self.rng.choice(pages))

    def offer(self) -> None:
        """A prefilled request, often under a name that was offered before."""
        if self.rng.random() < 0.3:
            self.names += 1
        name = f"r{max(0, self.names - self.rng.randrange(3))}"
        pages = self.free_pages()
        if name in self.promises or not pages:
            return
        page = self.rng.choice(pages)
        version = self.write(page)
        fresh = all(name != told for told, _ in self.told)
        blocks = None if fresh and self.rng.random() < 0.3 else [[page]]
        promise = Promise(name, page, version, set())
        self.promises[name] = promise
        for source in self.sources:
            source.engine.offer(name, blocks, ttl_s=self.rng.uniform(0.5, 4))
            promise.ranks.add(source.rank)
        self.told.append((name, page))

    def poll_source(self) -> None:
        source = self.rng.choice(self.sources)
        for release in source.engine.poll().released:
            promise = self.promises[release.request]
            promise.ranks.remove(source.rank)
            if not promise.ranks:
                del self.promises[release.request]

    def change_offer(self) -> None:
        """Renews or withdraws an offer, on one rank or all."""
        offered = [
            (source, promise.name)
            for promise in self.promises.values()
            for source in self.sources
            if promise.name in source.engine._offers._offers
        ]
        if not offered:
            return
        _, name = self.rng.choice(offered)
        withdraw = self.rng.random() < 0.3
        for source, other in offered:
            if other == name and self.rng.random() < 0.8:
                if withdraw:
                    source.engine.withdraw(name)
                else:
                    source.engine.renew(name, self.rng.uniform(0.5, 4))

    def tick(self) -> None:
        rank = self.rng.choice([*self.sources, *self.readers])
        rank.now += self.rng.expovariate(2)

    def start(self) -> None:
        """A reader was told of an offer, some time ago."""
        reader = self.rng.choice(self.readers)
        if not self.told:
            return
        name, page = self.rng.choice(self.told[-6:])
        to = self.rng.randrange(1, PAGES)
        before = reader.page(to).copy()
        if name in reader.started:
            return
        try:
            timeout_s = self.rng.uniform(0.5, 4)
            reader.engine.read(name, "P", [[to]], [[page]], timeout_s=timeout_s)
        except ValueError:
            return  # it was read before, or a read may still write the page
        reader.started[name] = (to, before)

    def poll_reader(self, reader: Rank | None = None) -> None:
        reader = reader or self.rng.choice(self.readers)
        for result in reader.engine.poll().finished:
            self.check_end(reader, result)

    def step(self) -> None:
        """The transport of one reader advances one of its reads."""
        open_reads = [
            (reader.transport, read)
            for reader in self.readers
            for read in reader.transport.reads
            if read.state == ACTIVE
        ]
        if open_reads:
            transport, read = self.rng.choice(open_reads)
            for _ in range(self.rng.choice([1, 1, 2, 100])):
                if read.pieces:
                    transport.step(read)

    def deliver(self) -> None:
        """A message arrives, is lost, or arrives and may be repeated."""
        if self.mail:
            i = self.rng.randrange(len(self.mail))
            to, sender, message = self.mail[i]
            fate = self.rng.random()
            if fate < 0.8:
                to.inbox.append((sender, message))
            if fate < 0.6 or fate >= 0.8:
                self.mail.pop(i)

    def cancel(self) -> None:
        reader = self.rng.choice(self.readers)
        if reader.started:
            running = [r for r in reader.started if r in reader.engine._reads._running]
            if running:
                reader.engine.cancel(self.rng.choice(running))

    def run(self, steps: int) -> None:
        """Any of these, in any order."""
        actions: list[tuple[Callable[[], None], int]] = [
            (self.overwrite, 6),
            (self.offer, 8),
            (self.poll_source, 14),
            (self.change_offer, 5),
            (self.tick, 6),
            (self.start, 14),
            (self.poll_reader, 25),
            (self.step, 40),
            (self.deliver, 5),
            (self.cancel, 1),
        ]
        calls, weights = zip(*actions, strict=True)
        for call in self.rng.choices(calls, weights, k=steps):
            call()

    def settle(self) -> None:
        """Nothing stalls any more: what is offered now is read, by every rank, and released."""
        for _ in range(4):
            for reader in self.readers:
                for read in list(reader.transport.reads):
                    while read.pieces:
                        reader.transport.step(read)
                self.poll_reader(reader)
        self.mail.clear()
        for source in self.sources:
            for name in list(source.engine._offers._offers):
                source.engine.withdraw(name)
            source.engine.poll()
        self.promises.clear()
        version = self.write(1)
        promise = Promise("last", 1, version, {source.rank for source in self.sources})
        self.promises["last"] = promise
        for source in self.sources:
            source.engine.offer("last", [[1]], ttl_s=1)
        before = self.outcomes["done"]
        for reader in self.readers:
            reader.engine.read("last", "P", [[1]], [[1]])
            reader.started["last"] = (1, reader.page(1).copy())
            for _ in range(3):
                for read in list(reader.transport.reads):
                    while read.pieces:
                        reader.transport.step(read)
                self.poll_reader(reader)
            assert (reader.page(1) == version).all()
        assert self.outcomes["done"] == before + len(self.readers)
        for to, sender, message in self.mail:
            to.inbox.append((sender, message))
        for source in self.sources:
            assert [tuple(r) for r in source.engine.poll().released] == [("last", "done")]
        for rank in (*self.sources, *self.readers):
            assert rank.engine.close(timeout_s=0) == []
