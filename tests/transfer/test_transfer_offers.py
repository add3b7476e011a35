"""Offers that end while they are read: no read ends done unless its sources held them to the end.

Stalls at every point of a read, with clocks and a transport that stand still until they are moved.
"""

from collections.abc import Callable
from typing import Any

import pytest

from kda_ops.transfer.results import ReadResult, TransferError
from kda_ops.transfer.transport import InProcessNetwork
from tests.support.transfer_faults import Paced
from tests.support.transfer_fleet import REMOTE, Fleet, Side, content, geometry, outcomes, releases

LOCAL = [[4], [1, 2, 8]]
EVERYTHING = 1 << 30
TTL_S = 5


class Stalled(Fleet):
    """A fleet whose readers move only as far as a test lets them."""

    def __init__(self, p: int = 1, d: int = 1, **fields: Any) -> None:
        self.network = InProcessNetwork()
        super().__init__(p, d, lambda name: Paced(self.network, name, 0), **fields)
        self.put("r", content(24, 0), REMOTE, ttl_s=TTL_S)
        self.connect()

    def pace(self, copies: int, *, deaf: bool = False) -> None:
        for side in self.readers:
            transport = side.engine.transport
            transport.copies_per_poll, transport.deaf = copies, deaf

    def start(self, **options: Any) -> None:
        for side in self.readers:
            side.engine.read("r", self.name, LOCAL, REMOTE, **options)

    def advance(self, point: str) -> None:
        """Advances readers to a point, with everything read up to there."""
        self.pace(EVERYTHING, deaf=True)
        if point == "not posted":
            return
        self.start()
        if point == "posted":
            return
        self.pace(0)
        assert outcomes([side.engine.poll() for side in self.readers]) == [[]] * self.d
        if point == "asked":
            return
        if point == "in flight":
            self.pace(1, deaf=True)
        elif point == "all bytes":
            self.pace(EVERYTHING, deaf=True)
        assert outcomes([side.engine.poll() for side in self.readers]) == [[]] * self.d
        if point == "all bytes":
            for side in self.readers:
                assert side.engine.counters.asks == 2 * side.engine.counters.reads

    def finish(self) -> list[ReadResult]:
        """Lets everything run; returns how all reads ended."""
        self.pace(EVERYTHING)
        ended = [result for side in self.readers for result in side.engine.poll().finished]
        assert len(ended) == self.d
        return ended

    def expect(self, seed: int = 0) -> None:
        for side in self.readers:
            side.write_state(4, content(24, seed))
            side.write_kv([1, 2, 8], content(24, seed))

    def overwrite(self, seed: int = 1) -> None:
        """The owner of the sources' pages gives them to another request."""
        for side in self.sources:
            side.write_state(3, content(24, seed))
            side.write_kv([5, 6, 7], content(24, seed))
            side.fill()

    def accept(self) -> None:
        """Ignores the contents of the readers' pages of the request."""
        for side in self.readers:
            side.accept(0, 4)
            for page in LOCAL[1]:
                side.accept(1, page)


POINTS = ("not posted", "posted", "asked", "in flight", "all bytes")


def expire(fleet: Stalled) -> None:
    for side in fleet.sources:
        side.clock.now += TTL_S + 1
        assert releases([side.engine.poll()]) == [[("r", "expired")]]


def withdraw(fleet: Stalled) -> None:
    for side in fleet.sources:
        side.engine.withdraw("r")
        assert releases([side.engine.poll()]) == [[("r", "withdrawn")]]


def another_engine_is_done(fleet: Stalled) -> None:
    """One of two engines that read the same offer: the source releases, the other still reads."""
    for rank in range(fleet.d):
        other = Side(Paced(fleet.network, f"E{rank}"), geometry(fleet.d), rank, "E")
        other.engine.connect("P", fleet.p, fleet.call)
        other.engine.read("r", "P", LOCAL, REMOTE)
        assert other.engine.poll().finished[0].outcome == "done"
    for side in fleet.sources:
        assert releases([side.engine.poll()]) == [[("r", "done")]]


def leave(fleet: Stalled) -> None:
    """The source closes normally, and its owner may reuse its pages."""
    for side in fleet.sources:
        assert side.engine.close() == []


def offered_again(fleet: Stalled) -> None:
    """Under the same name, in the same blocks, after others have written them."""
    expire(fleet)
    for side in fleet.sources:
        side.put("r", content(24, 2), REMOTE)


def offered_elsewhere(fleet: Stalled) -> None:
    """Under the same name, in other blocks."""
    expire(fleet)
    for side in fleet.sources:
        side.put("r", content(24, 2), [[0, 0, 8], [9, 10, 11]])


@pytest.mark.parametrize(
    "end", [expire, withdraw, another_engine_is_done, leave, offered_elsewhere]
)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
def test_an_offer_that_ends_is_not_read(
    end: Callable[[Stalled], None], point: str, p: int, d: int
) -> None:
    fleet = Stalled(p, d)
    fleet.advance(point)
    end(fleet)
    fleet.overwrite()
    if point == "not posted":
        fleet.start()
    begun = point in ("asked", "in flight", "all bytes")
    for result in fleet.finish():
        assert (result.outcome, result.in_flight) == ("failed", False)
        assert result.spoiled == ((4,), (1, 2, 8)) if begun else ((), ())
        if end is not leave:
            assert ("during the read" in result.error) == begun
    if begun:
        fleet.accept()
    fleet.check()  # where nothing was read nothing was written
    for side in (*fleet.sources, *fleet.readers):
        assert side.engine.counters.stray_notices == 0
        assert side.engine.transport.inbox == []  # no notice was sent


@pytest.mark.parametrize("point", POINTS)
def test_an_offer_of_the_same_name_and_blocks_is_another_one(point: str) -> None:
    """A read that began with the first one fails, one that begins with the second is done."""
    fleet = Stalled()
    fleet.advance(point)
    offered_again(fleet)
    if point == "not posted":
        fleet.start()
    (result,) = fleet.finish()
    if point in ("not posted", "posted"):
        assert result.outcome == "done"
        fleet.expect(seed=2)
    else:
        assert result.outcome == "failed"
        assert "ended its offer of 'r' during the read" in result.error
        fleet.accept()
        fleet.start()
        assert fleet.finish()[0].outcome == "done"
        fleet.expect(seed=2)
    fleet.check()
    assert releases([fleet.sources[0].engine.poll()]) == [[("r", "done")]]


@pytest.mark.parametrize("point", POINTS)
def test_a_renewed_offer_is_read(point: str) -> None:
    fleet = Stalled(2, 1)
    fleet.advance(point)
    for _ in range(3):
        for side in fleet.sources:
            side.clock.now += TTL_S - 1
            side.engine.renew("r", TTL_S)
            assert side.engine.poll().released == []
    if point == "not posted":
        fleet.start()
    assert fleet.finish()[0].outcome == "done"
    fleet.expect()
    fleet.check()
    assert releases([s.engine.poll() for s in fleet.sources]) == [[("r", "done")]] * 2


@pytest.mark.parametrize("point", POINTS)
def test_an_offer_is_held_until_its_source_ends_it(point: str) -> None:
    """It has expired, but its source has not polled: its pages are unchanged."""
    fleet = Stalled()
    fleet.advance(point)
    fleet.sources[0].clock.now += TTL_S + 1
    if point == "not posted":
        fleet.start()
    assert fleet.finish()[0].outcome == "done"
    fleet.expect()
    fleet.check()
    # the notice was there before the source looked at its clock
    assert releases([fleet.sources[0].engine.poll()]) == [[("r", "done")]]


@pytest.mark.parametrize("point", POINTS[1:])
def test_what_ends_after_the_confirmation_does_not_matter(point: str) -> None:
    fleet = Stalled()
    fleet.advance(point)
    fleet.pace(EVERYTHING)
    engine = fleet.readers[0].engine
    notify = engine.transport.notify

    def stall(peer: str, message: bytes) -> None:
        """The reader stands still between the answer and its notice."""
        expire(fleet)
        fleet.overwrite()
        notify(peer, message)

    engine.transport.notify = stall
    assert outcomes([engine.poll()]) == [[("r", "done")]]
    fleet.expect()
    fleet.check()
    source = fleet.sources[0].engine
    assert source.poll().released == []
    assert source.counters.stray_notices == 1


@pytest.mark.parametrize("point", POINTS[1:])
def test_one_of_two_sources_ends_its_offer(point: str) -> None:
    """All of a read is valid, or none of it is used."""
    fleet = Stalled(2, 1)
    fleet.advance(point)
    fleet.sources[1].engine.withdraw("r")
    (result,) = fleet.finish()
    assert result.outcome == "failed"
    assert result.error.startswith("rank 1 ")
    assert (result.spoiled == ((), ())) == (point == "posted")
    assert fleet.sources[0].engine.poll().released == []


@pytest.mark.parametrize("point", POINTS[1:])
def test_a_source_that_dies(point: str) -> None:
    """Also when all bytes are there: nobody says that they were right."""
    fleet = Stalled()
    fleet.advance(point)
    fleet.sources[0].engine.transport.close()
    (result,) = fleet.finish()
    assert (result.outcome, result.in_flight) == ("failed", False)
    assert "rank 0: " in result.error
    with pytest.raises(TransferError, match="engine P is not connected"):
        fleet.start()


@pytest.mark.parametrize("point", POINTS[1:])
def test_a_source_that_does_not_answer(point: str) -> None:
    """The read ends in time, and its pages are free unless the transport may still write them."""
    fleet = Stalled()
    fleet.advance(point)
    reader = fleet.readers[0]
    reader.engine.transport.deaf = True
    if point == "in flight":
        fleet.pace(0, deaf=True)
    reader.clock.now += 11
    (result,) = reader.engine.poll().finished
    in_flight = point in ("asked", "in flight")
    assert (result.outcome, result.in_flight) == ("timeout", in_flight)
    assert (result.spoiled == ((), ())) == (point == "posted")
    fleet.pace(EVERYTHING)
    assert reader.engine.poll().drained == (["r"] if in_flight else [])
    reader.accept(0, 4)
    for page in LOCAL[1]:
        reader.accept(1, page)
    fleet.check()
    fleet.start()
    assert fleet.finish()[0].outcome == "done"
    assert reader.engine.transport.open_reads == 0


# ---------------------------------------------------------------------- what is offered


def test_the_example_of_an_expired_offer() -> None:
    """A name without blocks, six seconds after an offer of five."""
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    source, reader = fleet.sources[0], fleet.readers[0].engine
    source.engine.offer("x", ttl_s=5)
    source.clock.now += 6
    assert releases([source.engine.poll()]) == [[("r", "expired"), ("x", "expired")]]
    fleet.overwrite()
    reader.read("x", "P", LOCAL, REMOTE, timeout_s=1)
    (result,) = reader.poll().finished
    assert (result.outcome, result.in_flight, result.spoiled) == ("failed", False, ((), ()))
    fleet.check()


def test_a_request_that_was_never_offered() -> None:
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    fleet.readers[0].engine.read("other", "P", LOCAL, REMOTE)
    (result,) = fleet.readers[0].engine.poll().finished
    assert (result.outcome, result.spoiled) == ("failed", ((), ()))
    assert result.error == "rank 0 does not offer 'other', or no more"
    assert fleet.readers[0].engine.counters.reads == 0
    fleet.check()
    fleet.start()  # the connection is as good as before
    assert fleet.finish()[0].outcome == "done"


@pytest.mark.parametrize("remote", [[[0, 0, 2], [5, 6, 7]], [[3], [5, 6, 9]], [[3], [5, 7, 6]]])
def test_blocks_other_than_those_on_offer(remote: list[list[int]]) -> None:
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    fleet.readers[0].engine.read("r", "P", LOCAL, remote)
    (result,) = fleet.readers[0].engine.poll().finished
    assert (result.outcome, result.spoiled) == ("failed", ((), ()))
    assert result.error == "rank 0 offers 'r' with other blocks"
    fleet.check()


def test_the_same_blocks_in_other_forms() -> None:
    """Of a state only the running block counts."""
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    local, remote = [[4, 9], LOCAL[1]], [[9, 9, 3, 11], [5, 6, 7]]
    reader = fleet.readers[0].engine
    for options in ({"local_running": 0}, {"remote_running": 2}):
        with pytest.raises(ValueError, match="_running must name the running block of group 0"):
            reader.read("r", "P", local, remote, **options)
    reader.read("r", "P", local, remote, local_running=0, remote_running=2)
    assert fleet.readers[0].engine.poll().finished[0].outcome == "done"
    fleet.expect()
    fleet.check()


def test_a_name_without_blocks_is_offered_once() -> None:
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    source, reader = fleet.sources[0].engine, fleet.readers[0].engine
    source.offer("plain", ttl_s=5)
    reader.read("plain", "P", LOCAL, REMOTE)
    assert reader.poll().finished[0].outcome == "done"
    fleet.expect()
    fleet.check()
    assert releases([source.poll()]) == [[("plain", "done")]]
    with pytest.raises(ValueError, match="blocks must be given of a request that was offered befo"):
        source.offer("plain")
    source.offer("plain", REMOTE)


def test_the_number_of_remembered_names_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kda_ops.transfer.offers.REMEMBERED_NAMES", 2)
    engine = Stalled().sources[0].engine
    for name in ("a", "b", "a"):
        engine.offer(name, REMOTE)
        engine.withdraw(name)
    engine.offer("c")
    with pytest.raises(ValueError, match="got None for 'a'"):
        engine.offer("a")
    engine.offer("b")


@pytest.mark.parametrize(
    ("blocks", "running", "match"),
    [
        ([[3]], None, "offered must have 2 lists of blocks, got 1"),
        ([[16], [5]], None, r"offered group 0 must hold pages in \[0, 16\), got 16"),
        ([[3], [-1]], None, r"offered group 1 must hold pages in \[0, 16\), got -1"),
        ([[3, 4], [5]], None, r"running must name the running block of group 0, .* \[3, 4\]"),
        ([[0], [5]], None, "offered group 0 must end in its running state, got the null block"),
        ([[3, 4], [5]], 2, r"running must be in \[0, 2\) for group 0, got 2"),
        ([[4], [5]], None, "offered group 0 must hold pages that no other read writes, got 4"),
    ],
)
def test_blocks_that_cannot_be_offered(
    blocks: list[list[int]], running: int | None, match: str
) -> None:
    fleet = Stalled()
    fleet.advance("in flight")
    engine = fleet.readers[0].engine
    with pytest.raises(ValueError, match=match):
        engine.offer("s", blocks, running=running)
    with pytest.raises(ValueError, match="request must be offered, got 's'"):
        engine.renew("s", 1)


def test_pages_on_offer_are_not_read_into() -> None:
    """Requests may share blocks: a page is free when the last one is released."""
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    engine = fleet.readers[0].engine
    engine.offer("a", [[9], [1, 2]])
    engine.offer("b", [[10], [1, 3]])
    for request in ("a", "b"):
        with pytest.raises(ValueError, match="local group 1 must hold pages that are not on offer"):
            fleet.start()
        engine.withdraw(request)
    fleet.start()
    assert fleet.finish()[0].outcome == "done"


def test_renewing_counts_from_now() -> None:
    (source,) = Stalled().sources
    source.engine.renew("r", 2)
    source.clock.now += 3
    assert releases([source.engine.poll()]) == [[("r", "expired")]]
    with pytest.raises(ValueError, match="request must be offered, got 'r'"):
        source.engine.renew("r")
    source.engine.offer("r", REMOTE, ttl_s=1)
    source.engine.renew("r")  # the engine's own timeout, 10 s
    source.clock.now += 9
    assert source.engine.poll().released == []
    source.clock.now += 2
    assert releases([source.engine.poll()]) == [[("r", "expired")]]


# ---------------------------------------------------------------------- messages


def test_what_a_read_costs() -> None:
    """Per pair of ranks two small reads, one read of pages, one message."""
    fleet = Stalled(4, 2)
    sent: list[str] = []
    for side in (*fleet.sources, *fleet.readers):
        notify = side.engine.transport.notify
        side.engine.transport.notify = lambda peer, message, notify=notify: (
            sent.append(peer),
            notify(peer, message),
        )
    fleet.start()
    for result in fleet.finish():
        assert result.outcome == "done"
    assert sorted(sent) == ["P0", "P1", "P2", "P3"]
    for side in fleet.readers:
        assert (side.engine.counters.asks, side.engine.counters.reads) == (4, 2)


def test_a_full_hit_asks_nobody() -> None:
    """No bytes, no asks; every rank that offers the request in these blocks gets a notice."""
    fleet = Stalled()
    fleet.pace(EVERYTHING)
    source, reader = fleet.sources[0].engine, fleet.readers[0].engine
    reader.read("r", "P", [[], []], REMOTE)
    assert reader.poll().finished[0].outcome == "done"
    assert reader.counters.asks == 0
    assert releases([source.poll()]) == [[("r", "done")]]
    # not for an offer of other blocks
    source.offer("s", [[2], [5]])
    reader.read("s", "P", [[], []], [[3], [5]])
    assert reader.poll().finished[0].outcome == "done"
    assert source.poll().released == []
    assert source.counters.stray_notices == 1


def test_late_notices_release_no_later_offer() -> None:
    """They are of a number that is over; a repeated one counts once."""
    fleet = Stalled(1, 2)
    source = fleet.sources[0]
    fleet.start()
    for result in fleet.finish():
        assert result.outcome == "done"
    late = source.engine.transport.notices()
    assert len(late) == 2
    expire(fleet)
    source.put("r", content(24, 0), REMOTE)
    source.engine.transport.inbox += late
    assert source.engine.poll().released == []
    assert source.engine.counters.stray_notices == 2


def test_more_reads_than_slots_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a free slot they wait; slots are freed with the answers, also of timed-out reads."""
    fleet = Stalled()
    fleet.pace(EVERYTHING, deaf=True)
    reader = fleet.readers[0]
    landing = reader.engine._reads._asks._landing
    landing._free = landing._free[:2]
    for i, name in enumerate(("a", "b")):
        reader.engine.read(name, "P", [[5 + i], []], REMOTE, timeout_s=1)
    reader.engine.read("r", "P", LOCAL, REMOTE)
    assert reader.engine.counters.asks == 2
    reader.clock.now += 2
    assert outcomes([reader.engine.poll()]) == [[("a", "timeout"), ("b", "timeout")]]
    assert reader.engine.counters.asks == 2  # their answers may still come into their slots
    reader.engine.transport.deaf = False
    reader.engine.poll()
    assert outcomes([reader.engine.poll()]) == [[("r", "done")]]
    fleet.expect()
    fleet.check()
    assert len(landing._free) == 2
