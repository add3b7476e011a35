"""The transfer engine over real NIXL: prefill in one process, decode in this one."""

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nixl_fleet import Decode, Prefill, all_finished, expect, wait
from tests.support.transfer_fleet import REMOTE, content

pytestmark = pytest.mark.nixl


@pytest.fixture(scope="module")
def prefill() -> Iterator[Prefill]:
    process = Prefill({"P1": 1, "P2": 2, "P4": 4, "S2": {"ranks": 2, "shared": True}})
    yield process
    assert all(left == {"reads": 0} for left in process.do("close"))
    process.stop()


@pytest.fixture
def decode(request: pytest.FixtureRequest) -> Iterator[Decode]:
    made = Decode(request.node.name)
    yield made
    made.close()


@pytest.mark.parametrize(("p", "d"), [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)])
def test_every_byte_between_any_two_sizes(prefill: Prefill, decode: Decode, p: int, d: int) -> None:
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


def test_two_hundred_requests_at_once(prefill: Prefill, decode: Decode) -> None:
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


def test_shared_memory(prefill: Prefill, decode: Decode) -> None:
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


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "reader"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_pages_on_a_gpu(decode: Decode, source: str, reader: str) -> None:
    """Pages are read between any kinds of memory."""
    prefill = Prefill({"P": {"ranks": 2, "device": source}})
    try:
        readers = decode(4, device=reader)
        prefill.do("put", engine="P", requests=[("r", 0, REMOTE)])
        for one in readers:
            one.engine.connect("P", 2, prefill.call("P"))
            one.engine.read("r", "P", [[4], [1, 2, 8]], REMOTE)
            expect(one, 4, [1, 2, 8], 0)
        for progress in wait(readers, all_finished):
            assert progress.finished[0].outcome == "done"
        for one in readers:
            one.check()
        assert prefill.released(2, readers) == {("P", rank, "r", "done") for rank in range(2)}
        prefill.do("check")
        assert all(left == {"reads": 0} for left in prefill.do("close"))
    finally:
        prefill.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("point", [0, 1, 2], ids=["before", "asked", "read"])
def test_an_offer_of_pages_on_a_gpu_that_ends_while_it_is_read(decode: Decode, point: int) -> None:
    """Boards are in host memory, wherever the pages are."""
    prefill = Prefill({"P": {"ranks": 1, "device": "cuda"}})
    try:
        (reader,) = decode(1, device="cuda")
        prefill.do("put", engine="P", requests=[("r", 0, REMOTE)])
        reader.engine.connect("P", 1, prefill.call("P"))
        reader.engine.transport.before = {
            point: lambda: prefill.do("end", engine="P", request="r", how="withdrawn")
        }
        reader.engine.read("r", "P", [[4], [1, 2, 8]], REMOTE)
        (result,) = wait([reader], all_finished)[0].finished
        assert result.outcome == "failed"
        assert result.spoiled == ((4,), (1, 2, 8)) if point else ((), ())
        for group, pages in enumerate(result.spoiled):
            for page in pages:
                reader.accept(group, page)
        reader.check()
        assert all(left == {"reads": 0} for left in prefill.do("close"))
    finally:
        prefill.stop()


def test_nothing_listens_beyond_loopback(decode: Decode) -> None:
    decode(1)
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(descriptor))
        except OSError:
            continue  # closed since it was listed
    listening = []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/self/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                words = bytes.fromhex(fields[1].split(":")[0])  # 32 bits each, in host order
                listening.append(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4)))
    assert listening, "no listening socket found"
    assert all(ipaddress.ip_address(address).is_loopback for address in listening), listening
