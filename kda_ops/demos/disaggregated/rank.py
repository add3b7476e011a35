"""One rank of the prefill or the decode engine, in its own process."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kda_ops.demos.disaggregated.model import Caches, Stack, StackConfig
from kda_ops.demos.disaggregated.sequence import Sequences
from kda_ops.transfer.engine import TransferEngine
from kda_ops.transfer.results import TransferError
from kda_ops.transfer.wire import HandshakeServer, tcp_caller

IDLE_S = 0.001
OFFER_S = 3600.0  # a reader's notice leaves it when it is idle again: after all tokens of a request


@dataclass(frozen=True)
class Place:
    """Which rank of which engine a process is.

    Attributes:
        engine: Name of the engine.
        tp_size: Its ranks.
        rank: The rank.
        store: A file through which the ranks of the engine find each other.
        page_padding: Bytes added to a state's page, so that the engines' pages differ.
        timeout_s: Timeout of a read.
        secret: The engines' shared secret.
        device: Where its weights and pages are.
    """

    engine: str
    tp_size: int
    rank: int
    store: str
    page_padding: int
    timeout_s: float
    secret: bytes
    device: str = "cpu"


@dataclass(frozen=True)
class Work:
    """A request passed from the prefill to the decode engine.

    Attributes:
        request: Its id.
        tokens: The prompt.
        count: New tokens to generate.
        drafts: A draft model's proposals for them.
        blocks: Blocks on the prefill engine, per group; they hold all tokens but the last.
    """

    request: str
    tokens: list[int]
    count: int
    drafts: list[int]
    blocks: list[list[int]]


@dataclass(frozen=True)
class Continuation:
    """A decode rank's answer to a request.

    Attributes:
        tokens: The new tokens.
        kept: Accepted tokens of each step.
        hit: Cached tokens of the prompt, and whether their state was cached.
        seconds: Duration of the read.
        first_token_s: From the command to the first new token.
        nbytes: Bytes read.
        reads: Reads posted, one per prefill rank that has a part of them.
    """

    tokens: list[int]
    kept: list[int]
    hit: tuple[int, bool]
    seconds: float
    first_token_s: float
    nbytes: int
    reads: int


def join(place: Place) -> DeviceMesh:
    """The ranks of an engine, over NCCL where each has a GPU of its own."""
    device = torch.device(place.device)
    alone = device.type == "cuda" and place.tp_size <= torch.cuda.device_count()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # not everywhere may a process use multicast
    store = dist.FileStore(place.store, place.tp_size)
    dist.init_process_group(
        "nccl" if alone else "gloo", store=store, rank=place.rank, world_size=place.tp_size
    )
    return init_device_mesh(device.type, (place.tp_size,))


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' `x`, in place."""
    dist.all_reduce(x)
    return x


class Rank:
    """Runs the commands that the main process sends."""

    def __init__(self, place: Place, config: StackConfig) -> None:
        from kda_ops.transfer.nixl import NixlTransport

        torch.set_num_threads(1)
        self.place = place
        self.device = torch.device(place.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # UCX registers memory in the current context
            torch.cuda.synchronize()
        config = replace(config, device=place.device)
        mesh = join(place) if place.tp_size > 1 else None
        reduce = sum_over_ranks if place.tp_size > 1 else lambda x: x
        model = Stack(config, mesh, reduce)
        caches = Caches(config, place.tp_size, place.page_padding)
        self.sequences = Sequences(model, caches)
        self.wait()
        self.engine = TransferEngine(
            NixlTransport(),
            caches.geometry,
            place.rank,
            caches.pages,
            name=place.engine,
            timeout_s=place.timeout_s,
            secret=place.secret,
        )
        self.server = HandshakeServer(self.engine.answer)
        self.offered: dict[str, list[list[int]]] = {}
        self.released: dict[str, str] = {}

    def wait(self) -> None:
        """Waits for what is running on the GPU: transfers know nothing of its streams."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def address(self) -> tuple[str, int]:
        """Where this rank answers handshakes."""
        return self.server.address

    def idle(self) -> None:
        """Runs between commands: frees pages whose last consumer is done."""
        for request, outcome in self.engine.poll().released:
            self.released[request] = outcome
            for group, blocks in enumerate(self.offered.pop(request)):
                self.sequences.give(group, blocks)

    def prefill(self, request: str, tokens: list[int]) -> list[list[int]]:
        """Computes all of a prompt but its last token, and offers its pages."""
        _, blocks = self.sequences.prefill(tokens[:-1])
        self.wait()
        self.engine.offer(request, blocks, ttl_s=OFFER_S)
        self.offered[request] = blocks
        return blocks

    def releases(self) -> dict[str, str]:
        """How offers have ended."""
        return self.released

    def connect(self, engine: str, addresses: Sequence[tuple[str, int]]) -> None:
        """Connects to an engine."""
        call = tcp_caller(dict(enumerate(addresses)), timeout_s=self.place.timeout_s)
        self.engine.connect(engine, len(addresses), call)

    def read_and_continue(self, engine: str, work: Work) -> Continuation:
        """Reads the uncached part of a prompt, then decodes."""
        start = time.perf_counter()
        sequences, ready = self.sequences, work.tokens[:-1]
        counters = self.engine.counters
        before = counters.reads, counters.bytes.total()
        hit = sequences.hit(ready)
        size = sequences.config.block_tokens
        count = sequences.blocks_of(len(ready))
        state = sequences.take(0, 1) if hit.state is None else [hit.state]
        table = [0] * (count - 1) + state
        # one more block than is read if the last token starts a new one
        fresh = sequences.take(1, sequences.blocks_of(len(work.tokens)) - len(hit.blocks))
        self.wait()
        self.engine.read(
            work.request,
            engine,
            [table if hit.state is None else [], fresh],
            work.blocks,
            computed=[0, len(hit.blocks) * size],
        )
        finished = self.engine.poll().finished
        while not finished:
            time.sleep(IDLE_S)
            finished = self.engine.poll().finished
        (result,) = finished
        if result.outcome != "done":
            raise TransferError(f"{result.outcome}: {result.error}")
        tokens, kept = sequences.generate(
            list(work.tokens), work.count, table, hit.blocks + fresh, work.drafts
        )
        covered = (len(hit.blocks) * size, hit.state is not None)
        return Continuation(
            tokens, kept, covered, result.seconds, sequences.first_token_at - start,
            counters.bytes.total() - before[1], counters.reads - before[0],
        )  # fmt: skip

    def counters(self) -> dict[str, Any]:
        """The engine's counters."""
        counters = self.engine.counters
        return {
            "reads": counters.reads,
            "ranges": counters.ranges,
            "bytes": dict(counters.bytes),
            "latency": dict(counters.latency),
        }

    def close(self) -> list[str]:
        """Closes the rank; returns requests whose reads are still in flight."""
        left = self.engine.close()
        self.server.close()
        if self.place.tp_size > 1:
            dist.destroy_process_group()
        return left


def run_rank(place: Place, config: StackConfig, connection: Connection) -> None:
    """The process: commands `(method, arguments)` in, `(result, error)` out, until `close`."""
    try:
        rank = Rank(place, config)
        connection.send((rank.address(), None))
        name = ""
        while name != "close":
            while not connection.poll(IDLE_S):
                rank.idle()
            name, arguments = connection.recv()
            connection.send((getattr(rank, name)(*arguments), None))
    except EOFError:
        return
    except Exception as error:
        connection.send((None, f"{place.engine} rank {place.rank}: {error!r}"))
