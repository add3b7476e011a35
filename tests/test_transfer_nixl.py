"""The transfer engine over real NIXL: prefill in one process, decode in this one."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kda_ops.transfer.results import Progress, TransferError
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.wire import tcp_caller
from tests.transfer_fleet import Side, content, geometry

pytestmark = pytest.mark.nixl

REMOTE = [[9, 9, 3], [5, 6, 7]]
PATIENCE_S = 60
PAGES = 420


class Prefill:
    """The other process."""

    def __init__(self, engines: dict[str, int], *, progress_thread: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nixl_prefill"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"NIXL_LOG_LEVEL": "FATAL", "OMP_NUM_THREADS": "1"},
        )
        self.addresses = self._ask(
            {"engines": engines, "pages": PAGES, "progress_thread": progress_thread}
        )

    def _ask(self, message: Any) -> Any:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def do(self, name: str, **arguments: Any) -> Any:
        return self._ask({"do": name, **arguments})

    def call(self, engine: str, timeout_s: float = 20) -> Callable[[int, bytes], bytes]:
        addresses = {i: tuple(a) for i, a in enumerate(self.addresses[engine])}
        return tcp_caller(addresses, timeout_s=timeout_s)

    def released(self, count: int, readers: list[Side]) -> set[tuple[Any, ...]]:
        """The next `count` releases; a notice leaves its reader while that one is polled."""
        found: set[tuple[Any, ...]] = set()
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            found |= {tuple(r) for r in self.do("take_released")}
            for reader in readers:
                reader.engine.poll()
        return found

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def prefill() -> Iterator[Prefill]:
    process = Prefill({"P1": 1, "P2": 2, "P4": 4, "S2": 2})
    yield process
    process.stop()


@pytest.fixture
def decode(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Side]]]:
    """Makes the ranks of a decode engine; they are closed in the end."""
    from kda_ops.transfer.nixl import NixlTransport

    made: list[Side] = []

    def make(tp: int, *, environment: dict[str, str] | None = None) -> list[Side]:
        name = f"D{len(made)}-{request.node.name}"[:200]
        sides = [
            Side(
                NixlTransport(environment=environment),
                geometry(tp, pages=PAGES, page_bytes=4096),
                rank,
                name,
                time.monotonic,
            )
            for rank in range(tp)
        ]
        made.extend(sides)
        return sides

    yield make
    for side in made:
        side.engine.close(timeout_s=1)


def wait(sides: list[Side], enough: Callable[[list[Progress]], bool]) -> list[Progress]:
    """Polls until what has happened is enough; the progress of every rank, added up."""
    total = [Progress([], [], []) for _ in sides]
    deadline = time.monotonic() + PATIENCE_S
    while not enough(total):
        assert time.monotonic() < deadline, total
        for side, sum_of_side in zip(sides, total, strict=True):
            for into, found in zip(sum_of_side, side.engine.poll(), strict=True):
                into.extend(found)
    return total


def all_finished(total: list[Progress]) -> bool:
    return all(progress.finished for progress in total)


@pytest.mark.parametrize(("p", "d"), [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)])
def test_every_byte_between_any_two_sizes(
    prefill: Prefill, decode: Callable[..., list[Side]], p: int, d: int
) -> None:
    """Three requests at once: no hit, a partial hit, a full hit."""
    engine = f"P{p}"
    readers = decode(d)
    requests = {f"{i}-{d}": blocks for i, blocks in enumerate((REMOTE, [[1], [2, 3, 4]], REMOTE))}
    local = [[[0, 0, 4], [1, 2, 8]], [[6], [9]], [[], []]]
    offered = [(request, seed, requests[request]) for seed, request in enumerate(requests)][:2]
    prefill.do("put", engine=engine, requests=offered)
    for reader in readers:
        reader.engine.connect(engine, p, prefill.call(engine))
        reader.write_state(4, content(24, 0))
        reader.write_kv([1, 2, 8], content(24, 0))
        reader.write_state(6, content(24, 1))
        reader.write_kv([9], content(24, 1), 2)
        for lists, (request, blocks) in zip(local, requests.items(), strict=True):
            reader.engine.read(request, engine, lists, blocks)
    total = wait(readers, lambda t: all(len(progress.finished) == 3 for progress in t))
    assert {r.outcome for progress in total for r in progress.finished} == {"done"}
    for reader in readers:
        reader.check()
    ids = list(requests)[:2]
    expected = {(engine, rank, request, "done") for rank in range(p) for request in ids}
    assert prefill.released(len(expected), readers) == expected
    prefill.do("check")


def test_two_hundred_requests_at_once(prefill: Prefill, decode: Callable[..., list[Side]]) -> None:
    readers = decode(2)
    blocks = {f"many{i}": [[1 + 2 * i], [1 + 2 * i, 2 + 2 * i]] for i in range(200)}
    offered = [(request, i % 5, lists) for i, (request, lists) in enumerate(blocks.items())]
    prefill.do("put", engine="P2", requests=offered)
    for reader in readers:
        reader.engine.connect("P2", 2, prefill.call("P2"))
        for i, (request, lists) in enumerate(blocks.items()):
            local = [lists[0], lists[1][::-1]]
            reader.write_state(local[0][0], content(24, i % 5))
            reader.write_kv(local[1], content(24, i % 5))
            reader.engine.read(request, "P2", local, lists)
    total = wait(readers, lambda t: all(len(progress.finished) == 200 for progress in t))
    assert {r.outcome for progress in total for r in progress.finished} == {"done"}
    for reader in readers:
        reader.check()
    assert prefill.released(400, readers) == {
        ("P2", r, i, "done") for r in range(2) for i in blocks
    }


def test_shared_memory(prefill: Prefill, decode: Callable[..., list[Side]]) -> None:
    from kda_ops.transfer.nixl import SHARED_MEMORY

    (reader,) = decode(1, environment=SHARED_MEMORY)
    prefill.do("put", engine="S2", requests=[("r", 0, REMOTE)])
    reader.engine.connect("S2", 2, prefill.call("S2"))
    reader.engine.read("r", "S2", [[4], [1, 2, 8]], REMOTE)
    reader.write_state(4, content(24, 0))
    reader.write_kv([1, 2, 8], content(24, 0))
    assert wait([reader], all_finished)[0].finished[0].outcome == "done"
    reader.check()
    assert prefill.released(2, [reader]) == {("S2", rank, "r", "done") for rank in range(2)}


def test_a_peer_that_stalls_and_then_dies(decode: Callable[..., list[Side]]) -> None:
    """A stalled read times out but is not over: its bytes come when the peer wakes up."""
    prefill = Prefill({"P1": 1}, progress_thread=True)
    try:
        (reader,) = decode(1)
        call = prefill.call("P1", timeout_s=1)
        offered = [(request, 0, REMOTE) for request in ("first", "stalled", "killed")]
        prefill.do("put", engine="P1", requests=offered)
        made = content(24, 0)
        reader.engine.connect("P1", 1, call)
        reader.engine.read("first", "P1", [[4], [1, 2, 8]], REMOTE)
        reader.write_state(4, made)
        reader.write_kv([1, 2, 8], made)
        assert wait([reader], all_finished)[0].finished[0].outcome == "done"
        reader.check()

        prefill.send(signal.SIGSTOP)
        reader.engine.read("stalled", "P1", [[5], [9]], REMOTE, timeout_s=0.5)
        (progress,) = wait([reader], all_finished)
        (result,) = progress.finished
        assert (result.outcome, result.in_flight) == ("timeout", True)
        assert 0.5 <= result.seconds < 10
        assert progress.drained == []
        reader.check()
        prefill.send(signal.SIGCONT)
        wait([reader], lambda t: t[0].drained == ["stalled"])
        reader.write_state(5, made)
        reader.write_kv([9], made, 2)
        reader.check()
        assert prefill.released(1, [reader]) == {("P1", 0, "first", "done")}

        prefill.send(signal.SIGSTOP)
        reader.engine.read("killed", "P1", [[6], [10]], REMOTE)
        reader.engine.poll()
        prefill.send(signal.SIGKILL)
        (result,) = wait([reader], all_finished)[0].finished
        assert (result.outcome, result.in_flight) == ("failed", False)
        with pytest.raises(TransferError, match="engine P1 is not connected"):
            reader.engine.read("late", "P1", [[6], [10]], REMOTE)
        with pytest.raises(TransferError, match="engine P1 cannot be reached"):
            reader.engine.connect("P1", 1, call)
        # the pages of the read that died may hold anything, no others
        for group, page in ((0, 6), (1, 10)):
            for layer in range(2):
                reader.expect(group, layer, page)[:] = reader.pages[group][layer][page].numpy()
        reader.check()
        assert reader.engine.close() == []
    finally:
        prefill.stop()


@pytest.mark.parametrize("spoil", ["agent", "pages"])
def test_untrusted_metadata(
    prefill: Prefill, decode: Callable[..., list[Side]], spoil: str
) -> None:
    """NIXL itself refuses metadata that is none, and ranges that are not registered."""
    (reader,) = decode(1)
    honest = prefill.call("P1")

    def call(rank: int, message: bytes) -> bytes:
        card = json.loads(honest(rank, message))
        if spoil == "agent":
            card["agent"] = base64.b64encode(os.urandom(200)).decode()
        else:
            for group, regions in zip(card["geometry"]["groups"], card["regions"], strict=True):
                group["pages"] *= 1000
                for region in regions:
                    region[1] *= 1000
        return json.dumps(card).encode()

    with pytest.raises(TransferError, match="cannot be reached"):
        reader.engine.connect("P1", 1, call)
    reader.engine.connect("P1", 1, honest)
    with pytest.raises(GeometryError, match="engine of answer must be 'Q', got 'P1'"):
        reader.engine.connect("Q", 1, honest)


def test_nothing_listens_beyond_loopback(decode: Callable[..., list[Side]]) -> None:
    decode(1)
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(descriptor))
        except OSError:
            continue  # closed since it was listed
    listening = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            listening.append(bytes.fromhex(fields[1].split(":")[0])[::-1])
    assert listening, "no listening socket found"
    assert {address[0] for address in listening} == {127}
