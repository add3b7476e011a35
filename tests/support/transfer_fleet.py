"""Two small engines with a state group and an attention group, and their expected pages."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from kda_ops.cache.spec import KDAStateSpec, Segment
from kda_ops.transfer.engine import TransferEngine
from kda_ops.transfer.geometry import EngineGeometry, PageGeometry, packed_geometry, state_geometry
from kda_ops.transfer.results import Progress
from kda_ops.transfer.transport import Transport

LAYERS, TOKEN_BYTES, GUARD = 2, 6, 64
HEADS, VALUE_HEADS = 4, 8
REMOTE = [[0, 0, 3], [5, 6, 7]]  # blocks of a request of 24 tokens
TP_SIZES = [(p, d) for p in range(1, 17) for d in range(1, 17) if p % d == 0 or d % p == 0]


def geometry(
    tp: int,
    *,
    pages: int = 16,
    block_tokens: int = 8,
    pages_per_block: int = 1,
    layout: str = "DS",
    page_bytes: int | None = None,
) -> EngineGeometry:
    """KDA states, and fewer KV heads than ranks (one per four)."""
    spec = KDAStateSpec(
        HEADS,
        VALUE_HEADS,
        8,
        4,
        num_spec=1,
        conv_dtype=torch.bfloat16,
        layout=layout,
        tp_size=tp,
        page_bytes=page_bytes,
    )
    state = state_geometry(spec, pages=pages, layers=LAYERS, block_tokens=8)
    unit = block_tokens // pages_per_block * TOKEN_BYTES
    kv = packed_geometry(
        [Segment("k", 2, unit), Segment("v", 2, unit)],
        name="kv",
        kind="attention",
        dtypes={"k": "bfloat16", "v": "bfloat16"},
        tp_size=tp,
        pages=pages * pages_per_block,
        block_tokens=block_tokens,
        pages_per_block=pages_per_block,
        page_bytes=4 * unit + 10,
        layers=LAYERS,
    )
    return EngineGeometry((state, kv))


def shard(units: np.ndarray, tp: int, rank: int) -> np.ndarray:
    """A rank's part of a segment."""
    if len(units) >= tp:
        return np.split(units, tp)[rank]
    return np.repeat(units, tp // len(units), axis=0)[rank : rank + 1]


def segment_slices(group: PageGeometry) -> dict[str, slice]:
    """The bytes of each segment in a page."""
    return {s.name: slice(s.offset, s.offset + group.local_bytes(s)) for s in group.segments}


@dataclass
class Content:
    """The un-sharded state and keys and values of one request, `[layers, units, ...]`."""

    tokens: int
    state: dict[str, np.ndarray]
    kv: dict[str, np.ndarray]


@functools.cache
def content(tokens: int, seed: int) -> Content:
    rng = np.random.default_rng(seed)
    state = {
        s.name: rng.integers(0, 256, (LAYERS, s.units, s.bytes_per_unit), dtype=np.uint8)
        for s in geometry(1).groups[0].segments
    }
    kv = {
        name: rng.integers(0, 256, (LAYERS, 2, tokens, TOKEN_BYTES), dtype=np.uint8)
        for name in ("k", "v")
    }
    return Content(tokens, state, kv)


class Side:
    """One rank: its engine, its pages between guards, and the bytes they are expected to hold."""

    def __init__(
        self,
        transport: Transport,
        shape: EngineGeometry,
        rank: int,
        name: str,
        clock: Callable[[], float] | None = None,
        device: str = "cpu",
        secret: bytes = b"",
        timeout_s: float = 10,
    ) -> None:
        self.shape, self.rank = shape, rank
        rng = np.random.default_rng(rank)
        self.whole, self.pages = [], []
        for group in shape.groups:
            nbytes = group.pages * group.page_bytes
            buffers = [
                torch.from_numpy(rng.integers(0, 256, nbytes + 2 * GUARD, dtype=np.uint8)).to(
                    device
                )
                for _ in range(LAYERS)
            ]
            self.whole.append(buffers)
            self.pages.append(
                [b[GUARD:-GUARD].view(group.pages, group.page_bytes) for b in buffers]
            )
        self.expected = [[b.cpu().clone() for b in buffers] for buffers in self.whole]
        self.clock = clock or Clock()
        self.engine = TransferEngine(
            transport,
            shape,
            rank,
            self.pages,
            name=name,
            timeout_s=timeout_s,
            clock=self.clock,
            secret=secret,
        )

    def expect(self, group: int, layer: int, page: int) -> np.ndarray:
        """A page as it is expected, to be written."""
        g = self.shape.groups[group]
        whole = self.expected[group][layer][GUARD:-GUARD]
        return whole.view(g.pages, g.page_bytes)[page].numpy()

    def write_state(self, page: int, made: Content) -> None:
        """The request's running state, in a page as expected."""
        group = self.shape.groups[0]
        for name, where in segment_slices(group).items():
            for layer in range(LAYERS):
                held = shard(made.state[name][layer], group.tp_size, self.rank)
                self.expect(0, layer, page)[where] = held.ravel()

    def write_kv(self, blocks: list[int], made: Content, first_block: int = 0) -> None:
        """The tokens of blocks from `first_block` on, zeros past the last token."""
        group = self.shape.groups[1]
        n = group.page_tokens
        for i in range(len(blocks) * group.pages_per_block):
            block, part = divmod(i, group.pages_per_block)
            token = first_block * group.block_tokens + i * n
            for name, where in segment_slices(group).items():
                for layer in range(LAYERS):
                    held = shard(made.kv[name][layer], group.tp_size, self.rank)[:, token:][:, :n]
                    full = np.zeros((held.shape[0], n, TOKEN_BYTES), np.uint8)
                    full[:, : held.shape[1]] = held
                    page = blocks[block] * group.pages_per_block + part
                    self.expect(1, layer, page)[where] = full.ravel()

    def put(self, request: str, made: Content, blocks: list[list[int]], **offer: float) -> None:
        """A prefilled request: its pages, and its offer."""
        self.put_many([(request, made, blocks)], **offer)

    def put_many(
        self, requests: list[tuple[str, Content, list[list[int]]]], **offer: float
    ) -> None:
        """Several prefilled requests."""
        for request, made, blocks in requests:
            self.write_state(blocks[0][-1], made)
            self.write_kv(blocks[1], made)
            self.engine.offer(request, blocks, **offer)
        self.fill()

    def accept(self, group: int, page: int) -> None:
        """Takes a page as it is: what a read that ended early has left in it."""
        for layer in range(LAYERS):
            self.expect(group, layer, page)[:] = self.pages[group][layer][page].cpu().numpy()

    def fill(self) -> None:
        """Makes the pages what they are expected to be."""
        for buffers, expected in zip(self.whole, self.expected, strict=True):
            for buffer, right in zip(buffers, expected, strict=True):
                buffer.copy_(right)
        if any(buffer.is_cuda for buffers in self.whole for buffer in buffers):
            torch.cuda.synchronize()

    def check(self) -> None:
        """Every byte, guards and padding and other requests' pages included."""
        for buffers, expected in zip(self.whole, self.expected, strict=True):
            for buffer, right in zip(buffers, expected, strict=True):
                assert torch.equal(buffer.cpu(), right)


class Clock:
    """A clock that advances when read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@dataclass
class Fleet:
    """A prefill engine of p ranks and a decode engine of d ranks."""

    p: int
    d: int
    transport: Callable[[str], Transport]
    prefill: EngineGeometry | None = None
    decode: EngineGeometry | None = None
    name: str = "P"
    sources: list[Side] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefill, decode = self.prefill or geometry(self.p), self.decode or geometry(self.d)
        for sides, shape, name in (
            (self.sources, prefill, self.name),
            (self.readers, decode, "D"),
        ):
            for rank in range(shape.tp_size):
                sides.append(Side(self.transport(f"{name}{rank}"), shape, rank, name))

    def call(self, rank: int, message: bytes) -> bytes:
        return self.sources[rank].engine.answer(message)

    def connect(self) -> None:
        for reader in self.readers:
            reader.engine.connect(self.name, self.p, self.call)

    def put(self, request: str, made: Content, blocks: list[list[int]], **offer: float) -> None:
        for side in self.sources:
            side.put(request, made, blocks, **offer)

    def poll(self, rounds: int = 1) -> tuple[list[Progress], list[Progress]]:
        """The progress of sources and readers, added up over some rounds."""
        found = []
        for sides in (self.readers, self.sources):
            polls = [[side.engine.poll() for _ in range(rounds)] for side in sides]
            found.append([Progress(*map(_joined, zip(*p, strict=True))) for p in polls])
        return found[1], found[0]

    def check(self) -> None:
        for side in (*self.sources, *self.readers):
            side.check()

    def close(self) -> list[list[str]]:
        return [side.engine.close(timeout_s=0.01) for side in (*self.readers, *self.sources)]


def _joined(lists: tuple[list, ...]) -> list:
    return [item for part in lists for item in part]


def outcomes(progress: list[Progress]) -> list[list[tuple[str, str]]]:
    """Per rank, ids and outcomes of finished reads."""
    return [[(r.request, r.outcome) for r in p.finished] for p in progress]


def releases(progress: list[Progress]) -> list[list[tuple[str, str]]]:
    """Per rank, ids and outcomes of released requests."""
    return [[tuple(r) for r in p.released] for p in progress]


def changed(shape: EngineGeometry, group: int, **fields: object) -> EngineGeometry:
    """The geometry with fields of one group replaced."""
    groups = list(shape.groups)
    groups[group] = dataclasses.replace(groups[group], **fields)
    return EngineGeometry(tuple(groups))
