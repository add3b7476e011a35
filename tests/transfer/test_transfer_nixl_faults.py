"""Faults of the transfer engine over real NIXL: each ends in time, with a clear error or a clean
retry, without a write outside the request's pages, and with nothing left registered.
"""

import time
from collections.abc import Iterator

import pytest

from kda_ops.transfer.results import ReadResult, TransferError
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.transport import TransportError
from tests.support.nixl_fleet import PATIENCE_S, Decode, Prefill, all_finished, expect, wait
from tests.support.transfer_faults import WRONG_FIELDS, tampered
from tests.support.transfer_fleet import REMOTE, Side

pytestmark = pytest.mark.nixl


@pytest.fixture(scope="module")
def prefill() -> Iterator[Prefill]:
    """A long-lived process that answers reads even while it is not polled."""
    process = Prefill({"P": 1, "P2": 2, "short": {"ranks": 1, "short": True}}, progress_thread=True)
    yield process
    assert all(left == {"reads": 0} for left in process.do("close"))
    process.stop()


@pytest.fixture
def mortal() -> Iterator[Prefill]:
    """A process for one test."""
    process = Prefill({"P": 1}, progress_thread=True)
    yield process
    process.stop()


@pytest.fixture
def decode(request: pytest.FixtureRequest) -> Iterator[Decode]:
    made = Decode(request.node.name)
    yield made
    made.close()


def connected(decode: Decode, prefill: Prefill, tp: int = 1) -> Side:
    """A reader of one rank, connected to an engine."""
    (reader,) = decode(1)
    engine = "P" if tp == 1 else f"P{tp}"
    reader.engine.connect(engine, tp, prefill.call(engine))
    return reader


def put(prefill: Prefill, *requests: str, engine: str = "P", **ttl: float) -> None:
    """Requests of one content in `REMOTE`."""
    offered = [(request, 0, REMOTE) for request in requests]
    prefill.do("put", engine=engine, requests=offered, **ttl)


def ended(reader: Side) -> ReadResult:
    """The end of the reader's only read."""
    ((result,),) = [progress.finished for progress in wait([reader], all_finished)]
    return result


def read_all(reader: Side, request: str, engine: str = "P") -> None:
    """A read of everything into pages 4 and 1, 2, 8, every byte of it right."""
    reader.engine.read(request, engine, [[4], [1, 2, 8]], REMOTE)
    expect(reader, 4, [1, 2, 8], 0)
    assert ended(reader).outcome == "done"
    reader.check()


# ---------------------------------------------------------------------- death


def test_a_peer_that_dies_before_a_read_and_comes_back(mortal: Prefill, decode: Decode) -> None:
    """With another geometry under its old name it is refused, with its own under a new one read."""
    reader = connected(decode, mortal)
    put(mortal, "r")
    mortal.kill()
    reader.engine.read("r", "P", [[4], [1, 2, 8]], REMOTE)
    result = ended(reader)
    assert (result.outcome, result.in_flight) == ("failed", False)
    reader.check()
    with pytest.raises(TransferError, match="engine P is not connected"):
        reader.engine.read("r", "P", [[4], [8]], REMOTE)
    with pytest.raises(TransferError, match="engine P cannot be reached"):
        reader.engine.connect("P", 1, mortal.call("P", timeout_s=1))
    other = {"ranks": 1, "shape": {"layout": "SD"}}
    again = Prefill({"P": other, "restarted": 1}, progress_thread=True)
    try:
        with pytest.raises(GeometryError, match=r"refused: group kda: layout .* 'SD' and 'DS'"):
            reader.engine.connect("P", 1, again.call("P"))
        put(again, "r", engine="restarted")
        reader.engine.connect("restarted", 1, again.call("restarted"))
        read_all(reader, "r", "restarted")
        assert again.released(1, [reader]) == {("restarted", 0, "r", "done")}
        assert all(left == {"reads": 0} for left in again.do("close"))
    finally:
        again.stop()


def test_a_peer_that_stalls_and_then_dies_while_it_is_read(mortal: Prefill, decode: Decode) -> None:
    """A stalled read times out but is not over: its bytes come when the peer wakes up."""
    reader = connected(decode, mortal)
    put(mortal, "first", "stalled", "killed")
    read_all(reader, "first")

    with mortal.stalled_in(reader, "stalled", "P", [[5], [9]], REMOTE, timeout_s=2):
        (progress,) = wait([reader], all_finished)
        (result,) = progress.finished
        assert (result.outcome, result.in_flight) == ("timeout", True)
        assert result.spoiled == ((5,), (9,))
        assert 2 <= result.seconds < PATIENCE_S
        assert progress.drained == []
        reader.check()
    wait([reader], lambda t: t[0].drained == ["stalled"])
    expect(reader, 5, [9], 0, first_block=2)
    reader.check()
    assert mortal.released(1, [reader]) == {("P", 0, "first", "done")}

    with mortal.stalled_in(reader, "killed", "P", [[6], [10]], REMOTE):
        mortal.kill()
    result = ended(reader)
    assert (result.outcome, result.in_flight) == ("failed", False)
    # the pages of the read that died may hold anything, no others
    reader.accept(0, 6)
    reader.accept(1, 10)
    reader.check()


def test_a_peer_that_dies_after_a_read(mortal: Prefill, decode: Decode) -> None:
    """Completed reads stay valid; an undeliverable notice is harmless."""
    reader = connected(decode, mortal)
    put(mortal, "read", "hit")
    read_all(reader, "read")
    with mortal.stalled():
        reader.engine.read("hit", "P", [[], []], REMOTE)  # a full hit: only its notice goes out
        mortal.kill()
    assert ended(reader).outcome == "done"
    for _ in range(20):
        reader.engine.poll()
    reader.check()


@pytest.mark.parametrize("stalled_at", [0, 200, 250], ids=["asked", "read", "some read"])
def test_a_peer_that_dies_with_many_reads_in_flight(
    mortal: Prefill, decode: Decode, stalled_at: int
) -> None:
    """All before they have asked, all before their pages are read, or some before."""
    reader = connected(decode, mortal)
    requests = {f"r{i}": [[4 + i], [1 + 2 * i, 2 + 2 * i]] for i in range(200)}
    put(mortal, *requests)
    counters = reader.engine.counters
    reader.engine.transport.before = {stalled_at: mortal.stall}
    for request, local in requests.items():
        reader.engine.read(request, "P", local, REMOTE)
    deadline = time.monotonic() + PATIENCE_S
    early: list[ReadResult] = []
    while counters.asks + counters.reads <= stalled_at:
        early += reader.engine.poll().finished
        assert time.monotonic() < deadline
    mortal.kill()
    early += reader.engine.poll().finished
    (progress,) = wait([reader], lambda t: len(early) + len(t[0].finished) == 200)
    results = {result.request: result for result in early + progress.finished}
    assert len(results) == 200
    if not early:
        assert {result.outcome for result in results.values()} == {"failed"}
    assert not any(result.in_flight for result in results.values())
    for request, (state, kv) in requests.items():
        result = results[request]
        if result.outcome == "done":
            expect(reader, state[0], kv, 0, first_block=1)
        assert result.spoiled[0] in ((), (state[0],))
        for page in result.spoiled[0]:
            reader.accept(0, page)
        for page in result.spoiled[1]:
            reader.accept(1, page)
    reader.check()


# ---------------------------------------------------------------------- handshakes


def test_a_handshake_that_is_not_answered(mortal: Prefill, decode: Decode) -> None:
    (reader,) = decode(1)
    begin = time.monotonic()
    with mortal.stalled(), pytest.raises(TransferError, match="engine P cannot be reached"):
        reader.engine.connect("P", 1, mortal.call("P", timeout_s=0.5))
    assert time.monotonic() - begin < PATIENCE_S
    put(mortal, "r")
    reader.engine.connect("P", 1, mortal.call("P"))
    read_all(reader, "r")


def test_every_wrong_handshake_field_is_rejected(prefill: Prefill, decode: Decode) -> None:
    """Also what only NIXL can detect: invalid metadata, unregistered memory."""
    (reader,) = decode(1)
    honest = prefill.call("P")
    begin = time.monotonic()
    for where, path, value in WRONG_FIELDS:
        with pytest.raises((GeometryError, TransferError)):
            reader.engine.connect("P", 1, tampered(honest, where, path, value))
        assert reader.engine.transport.left() == {"registrations": 2}, (where, path, value)
    assert time.monotonic() - begin < PATIENCE_S
    put(prefill, "fields")
    reader.engine.connect("P", 1, honest)
    read_all(reader, "fields")
    assert prefill.released(1, [reader]) == {("P", 0, "fields", "done")}
    prefill.do("check")


@pytest.mark.parametrize("name", [b"\xff\xfeno text", b"not\nprinted"])
def test_an_agent_whose_name_is_not_text(decode: Decode, name: bytes) -> None:
    """NIXL takes any bytes for a name; the agent is not kept."""
    own, other = (decode(1)[0].engine.transport for _ in range(2))
    metadata = other.metadata()
    honest = other.name.encode()[: len(name)]
    spoiled = metadata.replace(honest, name)
    assert spoiled != metadata
    with pytest.raises(TransportError, match="add_peer"):
        own.add_peer(spoiled)
    agent = own._transport._agent
    assert not agent.check_remote_metadata(name + other.name.encode()[len(name) :])
    assert own.add_peer(metadata) == other.name
    own.remove_peer(other.name)


def test_pages_registered_too_short(prefill: Prefill, decode: Decode) -> None:
    """The peer has registered less than its card says, or its card says more than there is."""
    (reader,) = decode(1)
    with pytest.raises(TransferError, match="engine short cannot be reached: prepare"):
        reader.engine.connect("short", 1, prefill.call("short"))
    honest = prefill.call("P")
    many = tampered(honest, "card", ("geometry", "groups", 0, "pages"), 1 << 20)
    for layer in range(2):
        many = tampered(many, "card", ("regions", 0, layer, 1), 1 << 40)
    with pytest.raises(TransferError, match="engine P cannot be reached: prepare"):
        reader.engine.connect("P", 1, many)
    assert reader.engine.transport.left() == {"registrations": 2}


def test_nonexistent_blocks(prefill: Prefill, decode: Decode) -> None:
    reader = connected(decode, prefill)
    put(prefill, "blocks")
    for local, remote, match in (
        ([[4], [420]], REMOTE, r"local group 1 must hold pages in \[0, 420\), got 420"),
        ([[-4], [8]], REMOTE, r"local group 0 must hold pages in \[0, 420\), got -4"),
        ([[4], [8]], [[420], [5, 6, 7]], r"remote group 0 must hold pages in \[0, 420\), got 420"),
        ([[4], [8]], [[3], [5, 6, 1 << 40]], "remote group 1 must hold pages"),
    ):
        with pytest.raises(ValueError, match=match):
            reader.engine.read("blocks", "P", local, remote)
    assert reader.engine.counters.reads == 0
    read_all(reader, "blocks")
    assert prefill.released(1, [reader]) == {("P", 0, "blocks", "done")}


# ---------------------------------------------------------------------- loss


def test_a_lost_notice(prefill: Prefill, decode: Decode) -> None:
    """The source keeps its pages until the offer expires, and says so."""
    reader = connected(decode, prefill, 2)
    put(prefill, "unheard", engine="P2", ttl_s=1)
    reader.engine.transport.loses_notices = True
    read_all(reader, "unheard", "P2")
    assert prefill.released(2, [reader]) == {("P2", r, "unheard", "expired") for r in range(2)}
    prefill.do("check")


# ---------------------------------------------------------------------- offers that end


def test_a_request_that_is_not_offered(prefill: Prefill, decode: Decode) -> None:
    """Never, or no longer, or in other blocks: nothing is read, and the connection stays usable."""
    reader = connected(decode, prefill, 2)
    put(prefill, "over", engine="P2", ttl_s=0.1)
    prefill.do("end", engine="P2", request="over", how="expired")
    put(prefill, "there", engine="P2")
    for request, remote in (
        ("never", REMOTE),
        ("over", REMOTE),
        ("there", [[0, 0, 3], [5, 6, 8]]),
    ):
        reader.engine.read(request, "P2", [[4], [1, 2, 8]], remote)
        result = ended(reader)
        assert (result.outcome, result.spoiled) == ("failed", ((), ()))
        reader.check()
    read_all(reader, "there", "P2")
    ends = (("over", "expired"), ("there", "done"))
    assert prefill.released(4, [reader]) == {("P2", r, *end) for r in range(2) for end in ends}


@pytest.mark.parametrize("how", ["withdrawn", "expired"])
@pytest.mark.parametrize("point", [0, 1, 2], ids=["before", "asked", "read"])
def test_an_offer_that_ends_while_it_is_read(
    prefill: Prefill, decode: Decode, how: str, point: int
) -> None:
    """Before the pages are read, before a byte of them has come, before they are confirmed."""
    reader = connected(decode, prefill)
    request = f"{how} at {point}"
    put(prefill, request)

    def end() -> None:
        if how == "expired":
            prefill.do("renew", engine="P", request=request, ttl_s=0)
        prefill.do("end", engine="P", request=request, how=how)

    reader.engine.transport.before = {point: end}
    reader.engine.read(request, "P", [[4], [1, 2, 8]], REMOTE)
    result = ended(reader)
    assert (result.outcome, result.in_flight) == ("failed", False)
    assert result.spoiled == ((4,), (1, 2, 8)) if point else ((), ())
    if point:
        for group, pages in enumerate(result.spoiled):
            for page in pages:
                reader.accept(group, page)
    reader.check()
    prefill.do("check")
    assert prefill.do("take_released") == [["P", 0, request, how]]


def test_a_renewed_offer(prefill: Prefill, decode: Decode) -> None:
    """It is read after its original deadline."""
    reader = connected(decode, prefill)
    begin, ttl_s = time.monotonic(), 5
    put(prefill, "renewed", ttl_s=ttl_s)
    prefill.do("renew", engine="P", request="renewed", ttl_s=PATIENCE_S)
    reader.engine.transport.before = {
        2: lambda: time.sleep(max(0.0, begin + ttl_s + 1 - time.monotonic()))
    }
    read_all(reader, "renewed")
    assert time.monotonic() > begin + ttl_s
    assert prefill.released(1, [reader]) == {("P", 0, "renewed", "done")}


# ---------------------------------------------------------------------- twice, cancelled


def test_a_request_is_read_once(prefill: Prefill, decode: Decode) -> None:
    """Twice at once and again afterwards are errors; what is released is read by nobody."""
    reader, late = connected(decode, prefill), connected(decode, prefill)
    put(prefill, "once")
    with prefill.stalled():
        reader.engine.read("once", "P", [[4], [1, 2, 8]], REMOTE)
        with pytest.raises(ValueError, match="request must not be read twice at once, got 'once'"):
            reader.engine.read("once", "P", [[5], [9]], REMOTE)
        with pytest.raises(ValueError, match="must hold pages that no other read writes, got 4"):
            reader.engine.read("other", "P", [[4], []], REMOTE)
    expect(reader, 4, [1, 2, 8], 0)
    assert ended(reader).outcome == "done"
    reader.check()
    with pytest.raises(ValueError, match="must not be read again after its notice, got 'once'"):
        reader.engine.read("once", "P", [[4], [8]], REMOTE)
    assert prefill.released(1, [reader]) == {("P", 0, "once", "done")}
    late.engine.read("once", "P", [[4], [1, 2, 8]], REMOTE)
    result = ended(late)
    assert (result.outcome, result.spoiled) == ("failed", ((), ()))
    assert result.error == "rank 0 does not offer 'once', or no more"
    late.check()
    assert prefill.do("take_released") == []


def test_reconnected_while_it_is_read(prefill: Prefill, decode: Decode) -> None:
    """The end of the first connection's read does not affect the second connection."""
    reader = connected(decode, prefill)
    put(prefill, "early", "late")
    reader.engine.read("early", "P", [[4], [1, 2, 8]], REMOTE)
    reader.engine.disconnect("P")
    reader.engine.connect("P", 1, prefill.call("P"))
    expect(reader, 4, [1, 2, 8], 0)
    assert ended(reader).outcome == "done"
    reader.engine.read("late", "P", [[5], [9]], REMOTE)
    expect(reader, 5, [9], 0, first_block=2)
    assert ended(reader).outcome == "done"
    reader.check()
    done = {("P", 0, request, "done") for request in ("early", "late")}
    assert prefill.released(2, [reader]) == done


def test_cancelled_while_it_is_read(prefill: Prefill, decode: Decode) -> None:
    reader = connected(decode, prefill)
    put(prefill, "cancelled")
    with prefill.stalled_in(reader, "cancelled", "P", [[4], [1, 2, 8]], REMOTE):
        reader.engine.cancel("cancelled")
        (progress,) = wait([reader], all_finished)
        (result,) = progress.finished
        assert (result.outcome, result.in_flight, progress.drained) == ("cancelled", True, [])
        reader.check()
        with pytest.raises(ValueError, match="must hold pages that no other read writes"):
            reader.engine.read("other", "P", [[4], []], REMOTE)
    wait([reader], lambda t: t[0].drained == ["cancelled"])
    for group, pages in enumerate(([4], [1, 2, 8])):
        for page in pages:
            reader.accept(group, page)
    reader.check()
    assert prefill.do("take_released") == []  # it sent no notice
    read_all(reader, "cancelled")
    assert prefill.released(1, [reader]) == {("P", 0, "cancelled", "done")}
