"""The host's part of a transfer: planning, matching blocks, posting reads. Needs no GPU.

Descriptors per second: ranges passed to a transport. A hybrid model at Kimi-Linear's sizes, 20 KDA
layers and 7 attention layers with 8 KV heads, prompts of 16384 tokens, no prefix hit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kda_ops.cache.spec import KDAStateSpec, Segment
from kda_ops.transfer.blocks import block_groups, match_blocks
from kda_ops.transfer.board import BUCKET_BYTES
from kda_ops.transfer.engine import TransferEngine
from kda_ops.transfer.geometry import EngineGeometry, packed_geometry, state_geometry
from kda_ops.transfer.plan import plan_reads
from kda_ops.transfer.transport import DONE, InProcessNetwork, InProcessTransport

pytestmark = pytest.mark.host

KDA_LAYERS, ATTENTION_LAYERS, KV_HEADS, HEAD_DIM = 20, 7, 8, 128
BLOCK, PROMPT, REQUESTS = 64, 16384, 8
STATES, PAGES = REQUESTS + 1, REQUESTS * PROMPT // BLOCK + 1
PAIRS = [(1, 1), (8, 8), (8, 2), (2, 8)]
ids = [f"{p}-to-{d}" for p, d in PAIRS]


def geometry(tp: int) -> EngineGeometry:
    """The model on `tp` ranks."""
    spec = KDAStateSpec(32, 32, 128, 128, conv_dtype=torch.bfloat16, layout="DS", tp_size=tp)
    unit = BLOCK * HEAD_DIM * 2
    attention = packed_geometry(
        [Segment("k", KV_HEADS, unit), Segment("v", KV_HEADS, unit)],
        name="kv",
        kind="attention",
        dtypes={"k": "bfloat16", "v": "bfloat16"},
        tp_size=tp,
        pages=PAGES,
        block_tokens=BLOCK,
        layers=ATTENTION_LAYERS,
    )
    state = state_geometry(spec, pages=STATES, layers=KDA_LAYERS, block_tokens=BLOCK)
    return EngineGeometry((state, attention))


def blocks(request: int) -> list[list[int]]:
    """Blocks of a request: the running state, and all keys and values."""
    count = PROMPT // BLOCK
    first = 1 + request * count
    return [[0] * (count - 1) + [request + 1], list(range(first, first + count))]


@dataclass(eq=False)
class Weightless(InProcessTransport):
    """Accepts nonexistent pages, whose reads complete at once; boards are really read."""

    def register(self, regions: Any, memory: str) -> Any:
        return super().register(regions, "cpu")

    def prepare(self, peer: str | None, ranges: Any, memory: str) -> Any:
        owner = self if peer is None else self.peers[peer]
        if len(ranges) == 1 and ranges[0].nbytes == BUCKET_BYTES:
            return super().prepare(peer, ranges, "cpu")
        return owner, None

    def release(self, prepared: Any) -> None: ...

    def read(self, local: Any, local_indices: Any, remote: Any, remote_indices: Any) -> Any:
        if remote[1] is None:
            return DONE
        return super().read(local, local_indices, remote, remote_indices)

    def status(self, read: Any) -> str:
        return read if read == DONE else super().status(read)

    def finish(self, read: Any) -> None: ...


@pytest.fixture
def count(benchmark: Any) -> Callable[..., None]:
    """Measures a call and records how many items it processes per second."""

    def measure(
        step: str,
        case: str,
        what: str,
        number: int,
        call: Callable[[], Any],
        setup: Callable[[], None] | None = None,
    ) -> None:
        assert number > 0
        benchmark.group = step
        if setup is None:
            benchmark(call)
        else:
            benchmark.pedantic(call, setup=setup, rounds=100)
        rate = number / benchmark.stats.stats.median
        benchmark.extra_info.update(step=step, case=case, what=what, per_second=rate)

    return measure


@pytest.mark.parametrize(("p", "d"), PAIRS, ids=ids)
def bench_plan(count: Callable[..., None], p: int, d: int) -> None:
    """The reads of one page of every group, for every reading rank."""
    src, dst = geometry(p), geometry(d)

    def plan() -> int:
        return sum(
            len(plan_reads(a, b, rank))
            for rank in range(d)
            for a, b in zip(src.groups, dst.groups, strict=True)
        )

    count("plan", f"{p}-to-{d}", "reads", plan(), plan)


def bench_match(count: Callable[..., None]) -> None:
    """The blocks of a request."""
    groups = block_groups(geometry(1), geometry(1))
    local, remote = blocks(0), blocks(1)
    pages = sum(len(match.copies) for match in match_blocks(local, remote, groups))
    count("match", f"{PROMPT}-tokens", "pages", pages, lambda: match_blocks(local, remote, groups))


@pytest.mark.parametrize(("p", "d"), PAIRS, ids=ids)
def bench_read(count: Callable[..., None], p: int, d: int) -> None:
    """Requests of one reading rank from `read` to their end, including boards but not pages."""
    network = InProcessNetwork()

    def engine(tp: int, rank: int, name: str) -> TransferEngine:
        shape = geometry(tp)
        pages = []
        for group in shape.groups:  # one buffer for all layers, never touched
            buffer = torch.empty(group.pages, group.page_bytes, dtype=torch.uint8)
            pages.append([buffer] * group.layers)
        return TransferEngine(Weightless(network, f"{name}{rank}"), shape, rank, pages, name=name)

    sources = [engine(p, rank, "prefill") for rank in range(p)]
    reader = engine(d, 0, "decode")
    reader.connect("prefill", p, lambda rank, message: sources[rank].answer(message))
    lists = [blocks(request) for request in range(REQUESTS)]
    rounds = 0

    def offer() -> None:
        nonlocal rounds
        rounds += 1
        for source in sources:
            for i, one in enumerate(lists):
                if rounds > 1:
                    source.withdraw(f"r{rounds - 1} {i}")
                source.offer(f"r{rounds} {i}", one)

    def read() -> None:
        for i, one in enumerate(lists):
            reader.read(f"r{rounds} {i}", "prefill", one, one)
        assert [r.outcome for r in reader.poll().finished] == ["done"] * REQUESTS

    offer()
    read()
    ranges = reader.counters.ranges
    count("read", f"{p}-to-{d}", "descriptors", ranges, read, offer)
    reader.close()
