"""The transfer engine over a transport inside the process, with faults."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kda_ops.cache.spec import KDAStateSpec
from kda_ops.transfer.engine import TransferEngine
from kda_ops.transfer.pages import buffer_pages, page_memory
from kda_ops.transfer.results import TransferError
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.transport import InProcessNetwork, InProcessTransport, Ranges, TransportError
from tests.support.transfer_faults import WRONG_FIELDS, Counted, Paced, tampered
from tests.support.transfer_fleet import (
    REMOTE,
    Fleet,
    Side,
    changed,
    content,
    geometry,
    outcomes,
    releases,
)


class Local(Fleet):
    """A fleet over one network; every fleet leaves nothing behind."""

    def __init__(self, p: int, d: int, *, copies_per_poll: int = 1 << 30, **fields: Any) -> None:
        self.network = fields.pop("network", InProcessNetwork())

        def transport(name: str) -> Paced:
            return Paced(self.network, name, copies_per_poll)

        super().__init__(p, d, transport, **fields)

    def pace(self, copies_per_poll: int) -> None:
        for side in self.readers:
            side.engine.transport.copies_per_poll = copies_per_poll

    def kill(self, rank: int) -> None:
        self.sources[rank].engine.transport.close()

    def check_nothing_left(self) -> None:
        assert not any(self.close())
        for side in (*self.readers, *self.sources):
            transport = side.engine.transport
            assert (transport.open_reads, transport.open_lists) == (0, 0)
            assert (transport.registered, transport.peers) == ([], {})
        assert self.network.agents.keys() <= {"spare"}


def start(fleet: Fleet, request: str, local: list[list[int]], **options: Any) -> None:
    for reader in fleet.readers:
        reader.engine.read(request, "P", local, REMOTE, **options)


@pytest.mark.parametrize(("p", "d"), [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)] + [(8, 2)])
@pytest.mark.parametrize("hit", ["none", "partial", "state only", "full"])
def test_readers_get_the_pages_they_would_have_computed(p: int, d: int, hit: str) -> None:
    fleet = Local(p, d, decode=geometry(d, page_bytes=4096))
    made = content(24, 0)
    fleet.put("r", made, REMOTE)
    fleet.connect()
    local = {
        "none": [[0, 0, 4], [1, 2, 8]],
        "partial": [[4], [8]],
        "state only": [[4], []],
        "full": [[], []],
    }[hit]
    for reader in fleet.readers:
        if local[0]:
            reader.write_state(4, made)
        reader.write_kv(local[1], made, 3 - len(local[1]))
    start(fleet, "r", local)
    sources, readers = fleet.poll()
    assert outcomes(readers) == [[("r", "done")]] * d
    assert releases(sources) == [[("r", "done")]] * p
    fleet.check()
    for reader in fleet.readers:
        total = sum(reader.engine.counters.bytes.values())
        assert (total > 0) == (hit != "full")
    fleet.check_nothing_left()


def test_row_interleaved_states_move_between_equal_sizes() -> None:
    shape = geometry(2, layout="SD")
    fleet = Local(2, 2, prefill=shape, decode=shape)
    made = content(24, 0)
    fleet.put("r", made, REMOTE)
    fleet.connect()
    for reader in fleet.readers:
        reader.write_state(4, made)
        reader.write_kv([8], made, 2)
    start(fleet, "r", [[4], [8]])
    fleet.poll()
    fleet.check()


@pytest.mark.parametrize(
    ("prefill", "decode", "remote", "local", "first", "computed"),
    [
        ({}, {"block_tokens": 16}, [5, 6, 7], [1, 2], 0, None),
        ({}, {"block_tokens": 16}, [5, 6, 7], [2], 1, None),
        ({"block_tokens": 16}, {}, [5, 6], [1, 2, 3], 0, 0),
        ({"block_tokens": 16}, {}, [5, 6], [3], 2, 16),
        ({"pages_per_block": 2}, {"pages_per_block": 4}, [5, 6, 7], [1, 2, 3], 0, None),
        ({"block_tokens": 12}, {}, [5, 6], [1, 2, 3], 0, 0),
    ],
)
def test_other_block_sizes_are_matched_by_token_and_the_tail_is_zero(
    prefill: dict[str, int],
    decode: dict[str, int],
    remote: list[int],
    local: list[int],
    first: int,
    computed: int | None,
) -> None:
    fleet = Local(2, 4, prefill=geometry(2, **prefill), decode=geometry(4, **decode))
    made = content(24, 0)
    fleet.put("r", made, [[3], remote])
    fleet.connect()
    for reader in fleet.readers:
        reader.write_state(4, made)
        reader.write_kv(local, made, first)
        hits = None if computed is None else [0, computed]
        reader.engine.read("r", "P", [[4], local], [[3], remote], computed=hits)
    _, readers = fleet.poll()
    assert outcomes(readers) == [[("r", "done")]] * 4
    fleet.check()
    fleet.check_nothing_left()


def test_pages_are_released_when_the_last_consumer_is_done() -> None:
    fleet = Local(1, 4)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    source = fleet.sources[0].engine
    for i, reader in enumerate(fleet.readers):
        assert source.poll().released == []
        reader.engine.read("r", "P", [[4], [8]], REMOTE)
        reader.engine.poll()
        if i < 3:  # the same consumer again does not count
            _, notice = source.transport.inbox[-1]
            reader.engine.transport.notify("P0", notice)
    assert [tuple(r) for r in source.poll().released] == [("r", "done")]
    assert source.counters.stray_notices == 0


def test_two_hundred_requests_at_once() -> None:
    """Interleaved, some cancelled on the way; every byte of all pages is accounted for."""
    shape = geometry(2, pages=420), geometry(4, pages=420)
    fleet = Local(2, 4, prefill=shape[0], decode=shape[1])
    fleet.connect()
    rng = np.random.default_rng(0)
    pages = rng.permutation(np.arange(1, 420))
    made = [content(16, seed) for seed in range(8)]
    fleet.pace(1)
    cancelled = set(rng.choice(200, 20, replace=False).tolist())
    blocks = {
        i: [[int(pages[2 * i])], [int(b) for b in pages[2 * i : 2 * i + 2]]] for i in range(200)
    }
    for i, lists in blocks.items():
        for side in fleet.sources:
            side.write_state(lists[0][0], made[i % 8])
            side.write_kv(lists[1], made[i % 8])
            side.engine.offer(str(i), lists)
    for side in fleet.sources:
        side.fill()
    for reader in fleet.readers:
        for i, lists in blocks.items():
            reader.engine.read(str(i), "P", lists, lists)
    fleet.poll()
    for reader in fleet.readers:
        for i in cancelled:
            reader.engine.cancel(str(i))
    first = fleet.poll()
    fleet.pace(1 << 30)
    second = fleet.poll(rounds=3)
    for rank, reader in enumerate(fleet.readers):
        ended = dict(outcomes(first[1])[rank] + outcomes(second[1])[rank])
        assert {int(i) for i, outcome in ended.items() if outcome == "cancelled"} == cancelled
        assert len(ended) == 200
        drained = first[1][rank].drained + second[1][rank].drained
        assert {int(i) for i in drained} == cancelled
        for i, lists in blocks.items():
            # what was cancelled ran on in the transport: its own pages are whole, or as they were
            reader.write_state(lists[0][0], made[i % 8])
            reader.write_kv(lists[1], made[i % 8])
    done = {i for progress in second[0] for i, outcome in releases([progress])[0]}
    assert done == {str(i) for i in set(range(200)) - cancelled}
    fleet.check()
    for i in cancelled:
        for side in fleet.sources:
            side.engine.withdraw(str(i))
    fleet.check_nothing_left()


# ---------------------------------------------------------------------- handshake


def test_no_source_is_prepared_twice() -> None:
    fleet = Local(2, 1)
    fleet.connect()
    fleet.connect()
    assert fleet.sources[0].engine.counters.handshakes == 1
    fleet.check_nothing_left()


def test_an_engine_is_reconnected_while_it_is_read() -> None:
    """Releasing the first connection does not affect the second."""
    fleet = Local(2, 1, copies_per_poll=0)
    made = content(24, 0)
    for request in ("early", "late"):
        fleet.put(request, made, REMOTE)
    fleet.connect()
    start(fleet, "early", [[4], [8]])
    engine = fleet.readers[0].engine
    engine.disconnect("P")
    with pytest.raises(TransferError, match="engine P is not connected"):
        start(fleet, "late", [[5], [9]])
    fleet.connect()
    assert engine.transport.open_lists == 16
    start(fleet, "late", [[5], [9]])
    engine.poll()
    engine.cancel("late")
    fleet.pace(1 << 30)
    progress = engine.poll()
    assert outcomes([progress]) == [[("late", "cancelled"), ("early", "done")]]
    assert progress.drained == ["late"]
    assert engine.transport.open_lists == 8
    start(fleet, "late", [[5], [9]])
    assert outcomes([engine.poll()]) == [[("late", "done")]]
    for state, kv in ((4, 8), (5, 9)):
        fleet.readers[0].write_state(state, made)
        fleet.readers[0].write_kv([kv], made, 2)
    fleet.check()
    assert releases([fleet.sources[0].engine.poll()]) == [[("early", "done"), ("late", "done")]]
    fleet.check_nothing_left()


def test_a_peer_with_more_pages_than_indices_is_rejected() -> None:
    fleet = Local(1, 1)
    pages = 1 << 26
    many = tampered(fleet.call, "card", ("geometry", "groups", 0, "pages"), pages)
    for layer in range(2):
        many = tampered(many, "card", ("regions", 0, layer, 1), 1 << 50)
    with pytest.raises(GeometryError, match=f"at most {1 << 28} ranges, got {8 * pages}"):
        fleet.readers[0].engine.connect("P", 1, many)
    fleet.check_nothing_left()


@pytest.mark.parametrize(("where", "path", "value"), WRONG_FIELDS, ids=str)
def test_every_wrong_handshake_field_is_rejected(
    where: str, path: tuple[Any, ...], value: Any
) -> None:
    fleet = Local(1, 1)
    with pytest.raises((GeometryError, TransferError)):
        fleet.readers[0].engine.connect("P", 1, tampered(fleet.call, where, path, value))
    transport = fleet.readers[0].engine.transport
    assert (transport.open_lists, transport.peers) == (0, {})
    refused = fleet.sources[0].engine.counters.refused
    assert refused == (where == "hello")
    fleet.connect()
    fleet.check_nothing_left()


def test_no_handshake_field_is_left_out() -> None:
    """`WRONG_FIELDS` names every field that a hello and a card carry."""
    fleet = Local(1, 1)
    seen: dict[str, Any] = {}

    def call(rank: int, message: bytes) -> bytes:
        seen.update(hello=json.loads(message), card=json.loads(fleet.call(rank, message)))
        return fleet.call(rank, message)

    fleet.readers[0].engine.connect("P", 1, call)

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(fields, value))
        if isinstance(value, dict):
            return value.keys() | set().union(*map(fields, value.values()))
        return set()

    for where, message in seen.items():
        wrong = {path[-1] for place, path, _ in WRONG_FIELDS if place == where}
        assert fields(message) <= wrong, where
    fleet.check_nothing_left()


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"\xff", b"[" * 10_000, b'{"version": 2}'])
def test_answers_that_are_not_handshakes(answer: bytes) -> None:
    fleet = Local(1, 1)
    with pytest.raises(GeometryError, match=r"message must be JSON|answer must"):
        fleet.readers[0].engine.connect("P", 1, lambda rank, message: answer)
    assert json.loads(fleet.sources[0].engine.answer(answer)).keys() == {"version", "error"}
    fleet.check_nothing_left()


def test_a_mismatch_names_the_field_and_both_values() -> None:
    shape = geometry(1)  # 4 rows
    fleet = Local(1, 1, prefill=changed(shape, 0, conv_size=3, num_spec=2))
    with pytest.raises(GeometryError, match=r"rank 0 refused: .*kda: conv_size .* got 3 and 4"):
        fleet.connect()


def test_ranks_of_an_engine_must_agree() -> None:
    fleet = Local(2, 1)
    other = Side(fleet.transport("spare"), geometry(2, pages=17), 1, "P")
    with pytest.raises(GeometryError, match="geometry of rank 1 must be that of the ranks before"):
        fleet.readers[0].engine.connect(
            "P", 2, lambda rank, m: (fleet.sources[0], other)[rank].engine.answer(m)
        )
    fleet.check_nothing_left()


def test_a_reader_asks_only_its_own_sources() -> None:
    fleet = Local(2, 4)
    with pytest.raises(GeometryError, match=r"rank 0 of 4 must read from ranks \[0\], got 1"):
        fleet.readers[0].engine.connect("P", 2, lambda rank, m: fleet.call(1, m))


# ---------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("local", "remote", "match"),
    [
        ([[4], [16]], REMOTE, r"local group 1 must hold pages in \[0, 16\), got 16"),
        ([[-4], [8]], REMOTE, r"local group 0 must hold pages in \[0, 16\), got -4"),
        ([[4], [8]], [[3], [99]], r"remote group 1 must hold pages in \[0, 16\), got 99"),
        ([[4], [8]], [[-3], [5]], r"remote group 0 must hold pages in \[0, 16\), got -3"),
        ([[4], [8, 8]], REMOTE, r"local group 1 must not repeat a block, got \[8, 8\]"),
        ([[4]], REMOTE, "local must have 2 lists of blocks, got 1"),
    ],
)
def test_nonexistent_blocks_are_rejected_before_anything_is_read(
    local: list[list[int]], remote: list[list[int]], match: str
) -> None:
    fleet = Local(2, 1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    engine = fleet.readers[0].engine
    with pytest.raises(ValueError, match=match):
        engine.read("r", "P", local, remote)
    assert engine.counters.reads == 0
    assert engine.poll().finished == []
    fleet.check()
    engine.read("r", "P", [[], []], REMOTE)
    assert outcomes([engine.poll()]) == [[("r", "done")]]
    fleet.check_nothing_left()


def test_a_tail_outside_the_pages_is_rejected() -> None:
    fleet = Local(1, 1, decode=geometry(1, block_tokens=16, pages_per_block=2, pages=16))
    fleet.put("r", content(8, 0), [[3], [5]])
    fleet.connect()
    with pytest.raises(ValueError, match=r"local group 1 must hold pages in \[0, 32\), got 32"):
        fleet.readers[0].engine.read("r", "P", [[4], [16]], [[3], [5]])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda p: p[:1], r"pages must have 2 groups, got 1"),
        (lambda p: [p[0][:1], p[1]], "pages of group kda must have 2 layers, got 1"),
        (lambda p: [[x[:-1] for x in p[0]], p[1]], "pages of group kda must be uint8"),
        (lambda p: [p[0], [x.char() for x in p[1]]], "pages of group kv must be uint8"),
        (
            lambda p: [[x.t().contiguous().t() for x in p[0]], p[1]],
            "pages of group kda must have no gaps",
        ),
    ],
)
def test_own_pages_must_match_the_geometry(spoil: Callable[[Any], Any], match: str) -> None:
    side = Side(InProcessTransport(InProcessNetwork(), "a"), geometry(1), 0, "D")
    other = InProcessTransport(InProcessNetwork(), "b")
    pages = [[x.view(torch.int8) if x.dtype != torch.uint8 else x for x in p] for p in side.pages]
    with pytest.raises(ValueError, match=match):
        TransferEngine(other, side.shape, 0, spoil(pages))
    with pytest.raises(ValueError, match=r"rank must be in \[0, 1\), got 1"):
        TransferEngine(other, side.shape, 1, pages)


def test_the_kind_of_memory_travels_with_the_card() -> None:
    """Lists of own ranges use the own memory kind, those of a peer's the peer's."""
    prepared = []

    class Recording(Counted):
        def prepare(self, peer: str | None, ranges: list[Ranges], memory: str) -> Any:
            prepared.append((peer, memory))
            return super().prepare(peer, ranges, "cpu")

    network = InProcessNetwork()
    fleet = Fleet(1, 1, lambda name: Recording(InProcessTransport(network, name)))
    on_gpu = tampered(fleet.call, "card", ("memory",), "cuda")
    fleet.readers[0].engine.connect("P", 1, on_gpu)
    assert prepared[:2] == [(None, "cpu"), ("P0", "cuda")]
    assert prepared[2:] == [(None, "cpu"), ("P0", "cpu")]  # boards are in host memory
    fleet.close()
    assert [side.engine.transport.left() for side in (*fleet.readers, *fleet.sources)] == [{}, {}]


def test_pages_are_all_in_one_kind_of_memory() -> None:
    host, other = torch.zeros(2, 8), torch.zeros(2, 8, device="meta")
    assert page_memory([[host], [host]]) == "cpu"
    for pages in ([[host], [other]], [[other]]):
        with pytest.raises(ValueError, match="pages must all be on cpu or all on cuda, got"):
            page_memory(pages)
    transport = InProcessTransport(InProcessNetwork(), "a")
    with pytest.raises(TransportError, match="memory must be cpu in a process, got cuda"):
        transport.register([], "cuda")


def test_an_engine_that_cannot_start_leaves_nothing_registered() -> None:
    class Mute(Counted):
        def metadata(self) -> bytes:
            raise TransportError("no metadata")

    transport = Mute(InProcessTransport(InProcessNetwork(), "a"))
    with pytest.raises(TransportError, match="no metadata"):
        Side(transport, geometry(1), 0, "D")
    assert transport.left() == {}


def test_pages_registered_too_short() -> None:
    """The peer claims more than it has registered: its transport refuses, nothing is kept."""
    fleet = Local(1, 1)
    transport = fleet.sources[0].engine.transport
    transport.registered[0][0] = transport.registered[0][0]._replace(nbytes=100)
    with pytest.raises(TransferError, match=r"cannot be reached: .* not registered"):
        fleet.connect()
    fleet.check_nothing_left()


def test_state_pages_as_bytes() -> None:
    spec = KDAStateSpec(2, 2, 4, 4, conv_dtype=torch.bfloat16, layout="DS")
    conv, recurrent = spec.allocate(5, layers=3)
    pages = buffer_pages(conv, spec.page_bytes)
    assert [tuple(x.shape) for x in pages] == [(5, spec.page_bytes)] * 3
    recurrent[2, 4] = 1.0
    start = spec.offset("recurrent")
    assert pages[2][4, start : start + spec.local_bytes("recurrent")].any()
    assert not pages[2][3].any()
    assert not pages[1].any()
    with pytest.raises(ValueError, match="state must begin a buffer"):
        buffer_pages(recurrent, spec.page_bytes)


# ---------------------------------------------------------------------- time


def test_a_read_that_does_not_end_times_out_and_keeps_its_pages() -> None:
    fleet = Local(1, 1, copies_per_poll=0)
    made = content(24, 0)
    fleet.put("r", made, REMOTE, ttl_s=30)
    fleet.connect()
    reader, source = fleet.readers[0], fleet.sources[0]
    start(fleet, "r", [[4], [8]], timeout_s=5)
    assert reader.engine.poll().finished == []
    reader.clock.now += 5
    (result,) = reader.engine.poll().finished
    assert (result.outcome, result.in_flight) == ("timeout", True)
    assert "not done within 5 s" in result.error
    with pytest.raises(ValueError, match="request must not be read twice at once"):
        start(fleet, "r", [[4], [8]])
    for page, lists in ((4, [[4], []]), (8, [[5], [8]])):
        with pytest.raises(ValueError, match=rf"no other read writes, got {page}, .* to 'r'"):
            reader.engine.read("other", "P", lists, REMOTE)
    assert reader.engine.poll().drained == []
    fleet.check()
    # the transport resumes: it still writes the pages that were kept
    fleet.pace(1 << 30)
    assert reader.engine.poll().drained == ["r"]
    reader.write_state(4, made)
    reader.write_kv([8], made, 2)
    fleet.check()
    assert source.engine.poll().released == []  # it sent no notice
    start(fleet, "r", [[4], [8]])
    assert outcomes([reader.engine.poll()]) == [[("r", "done")]]
    assert releases([source.engine.poll()]) == [[("r", "done")]]
    fleet.check_nothing_left()


def test_cancelling_while_reading() -> None:
    fleet = Local(2, 1, copies_per_poll=1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    engine = fleet.readers[0].engine
    start(fleet, "r", [[4], [8]])
    engine.poll()
    engine.cancel("r")
    with pytest.raises(ValueError, match="request must be a running read, got 'r'"):
        engine.cancel("r")
    (result,) = engine.poll().finished
    assert (result.outcome, result.in_flight) == ("cancelled", True)
    assert fleet.sources[0].engine.poll().released == []
    assert fleet.close()[0] == []  # waits until the transport has let go


def test_closing_reports_what_the_transport_does_not_free() -> None:
    fleet = Local(1, 1, copies_per_poll=0)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    engine = fleet.readers[0].engine
    engine.poll()
    assert engine.close(timeout_s=0.001) == ["r"]
    assert engine.transport.registered
    assert engine.close() == []
    with pytest.raises(TransferError, match="closed"):
        fleet.connect()


def test_lost_notices_expire_the_offer() -> None:
    fleet = Local(1, 2)
    fleet.put("r", content(24, 0), REMOTE, ttl_s=5)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    source = fleet.sources[0]
    fleet.readers[0].engine.poll()
    fleet.readers[1].engine.poll()
    source.engine.transport.inbox.pop()
    assert source.engine.poll().released == []
    source.clock.now += 5
    assert releases([source.engine.poll()]) == [[("r", "expired")]]
    fleet.check_nothing_left()


# ---------------------------------------------------------------------- twice, strays


def test_a_request_is_read_once() -> None:
    fleet = Local(1, 1, copies_per_poll=1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    with pytest.raises(ValueError, match="request must not be read twice at once, got 'r'"):
        start(fleet, "r", [[4], [8]])
    fleet.pace(1 << 30)
    _, readers = fleet.poll()
    assert outcomes(readers) == [[("r", "done")]]
    with pytest.raises(ValueError, match="request must not be read again after its notice"):
        start(fleet, "r", [[4], [8]])
    fleet.check_nothing_left()


def test_strays_release_nothing() -> None:
    fleet = Local(1, 1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    source = fleet.sources[0].engine
    start(fleet, "r", [[4], [8]])
    fleet.readers[0].engine.poll()
    ((agent, message),) = source.transport.notices()
    assert agent == "D0"
    good = json.loads(message)
    bad = [
        b"",
        b"\xff",
        b"x" * 5000,
        b"[]",
        *(
            json.dumps(good | change).encode()
            for change in (
                {"version": 1},
                {"engine": "E"},
                {"rank": 1},
                {"rank": -1},
                {"request": "s"},
                {"request": 5},
                {"offer": good["offer"] - 1},
                {"offer": None},
                {"offer": 0, "blocks": "0" * 16},
                {"blocks": ""},
                {"surplus": 0},
            )
        ),
    ]
    for message in bad:
        source.transport.inbox.append(("D0", message))
    source.transport.inbox.append(("impostor", json.dumps(good).encode()))
    assert source.poll().released == []
    assert source.counters.stray_notices == len(bad) + 1
    source.transport.inbox.append(("D0", json.dumps(good).encode()))
    assert releases([source.poll()]) == [[("r", "done")]]


def test_the_number_of_remembered_consumers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came last; a notice of another one is a stray."""
    monkeypatch.setattr("kda_ops.transfer.offers.REMEMBERED_CONSUMERS", 3)
    fleet = Local(1, 4)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    sources, _ = fleet.poll()
    assert releases(sources) == [[]]
    assert fleet.sources[0].engine.counters.stray_notices == 1


def test_failing_notices_affect_nothing_else() -> None:
    class Deaf(Counted):
        def notices(self) -> list[tuple[str, bytes]]:
            raise TransportError("no notices")

    network = InProcessNetwork()
    fleet = Fleet(1, 1, lambda name: Deaf(Paced(network, name, 0)))
    fleet.put("r", content(24, 0), REMOTE, ttl_s=5)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    engine, source = fleet.readers[0].engine, fleet.sources[0]
    engine.poll()
    engine.cancel("r")
    assert outcomes([engine.poll()]) == [[("r", "cancelled")]]
    engine.transport._transport.copies_per_poll = 1 << 30
    assert engine.poll().drained == ["r"]
    source.clock.now += 5
    assert releases([source.engine.poll()]) == [[("r", "expired")]]


def test_offers() -> None:
    engine = Local(1, 1).sources[0].engine
    engine.offer("r")
    with pytest.raises(ValueError, match="request must not be offered twice, got 'r'"):
        engine.offer("r")
    engine.withdraw("r")
    with pytest.raises(ValueError, match="request must be offered, got 'r'"):
        engine.withdraw("r")
    with pytest.raises(ValueError, match="request must be a printable string"):
        engine.offer("")
    assert releases([engine.poll()]) == [[("r", "withdrawn")]]


# ---------------------------------------------------------------------- death


def test_a_peer_that_is_dead_before() -> None:
    fleet = Local(2, 1)
    fleet.kill(1)
    with pytest.raises(TransferError, match="engine P cannot be reached: agent 'P1' is gone"):
        fleet.connect()
    with pytest.raises(TransferError, match="engine P is not connected"):
        start(fleet, "r", [[4], [8]])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_read_that_cannot_start_starts_no_sibling(rank: int) -> None:
    fleet = Local(2, 1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    fleet.kill(rank)
    start(fleet, "r", [[4], [8]])
    reader, alive = fleet.readers[0].engine, fleet.sources[1 - rank].engine
    assert (reader.counters.asks, reader.counters.reads) == (rank, 0)
    (result,) = reader.poll().finished
    assert result.outcome == "failed"
    assert f"rank {rank}: agent 'P{rank}' is gone" in result.error
    assert alive.poll().released == []
    with pytest.raises(TransferError, match="engine P is not connected"):
        start(fleet, "r", [[4], [8]])


def test_a_peer_that_dies_while_it_is_read() -> None:
    fleet = Local(2, 1, copies_per_poll=1)
    made = content(24, 0)
    fleet.put("r", made, REMOTE)
    fleet.connect()
    reader = fleet.readers[0]
    start(fleet, "r", [[4], [8]])
    reader.engine.poll()
    fleet.kill(1)
    (result,) = reader.engine.poll().finished
    assert (result.outcome, result.in_flight) == ("failed", True)  # rank 0 is still being read
    fleet.pace(1 << 30)
    assert reader.engine.poll().drained == ["r"]
    assert fleet.sources[0].engine.poll().released == []
    # every page but the request's own is as it was
    for group, page in ((0, 4), (1, 8)):
        for layer in range(2):
            reader.expect(group, layer, page)[:] = reader.pages[group][layer][page].numpy()
    fleet.check()
    assert not any(fleet.close())
    assert reader.engine.transport.peers == {}


def test_a_peer_that_comes_back() -> None:
    """A restart has another name; with another geometry it is refused, with the same it works."""
    fleet = Local(1, 1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    fleet.kill(0)
    start(fleet, "r", [[4], [8]])
    reader = fleet.readers[0]
    assert outcomes([reader.engine.poll()]) == [[("r", "failed")]]

    def restart(name: str, shape: Any) -> Side:
        return Side(InProcessTransport(fleet.network, f"{name}0"), shape, 0, name)

    other = restart("P2", changed(geometry(1), 0, num_spec=2))

    def other_call(rank: int, message: bytes) -> bytes:
        return other.engine.answer(message)

    with pytest.raises(GeometryError, match=r"refused: group kda: num_spec .* got 2 and 1"):
        reader.engine.connect("P2", 1, other_call)
    again = restart("P3", geometry(1))
    made = content(24, 5)
    again.write_state(3, made)
    again.write_kv([5, 6, 7], made)
    again.fill()
    again.engine.offer("r", REMOTE)
    reader.engine.connect("P3", 1, lambda rank, m: again.engine.answer(m))
    reader.engine.read("r", "P3", [[4], [8]], REMOTE)
    reader.write_state(4, made)
    reader.write_kv([8], made, 2)
    assert outcomes([reader.engine.poll()]) == [[("r", "done")]]
    reader.check()
    assert releases([again.engine.poll()]) == [[("r", "done")]]


# ---------------------------------------------------------------------- in-process transport


def test_counters_say_what_was_moved() -> None:
    fleet = Local(2, 1)
    fleet.put("r", content(24, 0), REMOTE)
    fleet.connect()
    start(fleet, "r", [[4], [8]])
    fleet.poll()
    counters = fleet.readers[0].engine.counters
    spec = {
        f"{g.name}.{s.name}": s.units * s.bytes_per_unit
        for g in geometry(1).groups
        for s in g.segments
    }
    assert counters.bytes == {name: 2 * nbytes for name, nbytes in spec.items()}
    assert (counters.reads, counters.outcomes) == (2, {"done": 1})
    assert sum(counters.latency.values()) == 1


def test_the_transport_refuses_what_is_not_registered() -> None:
    network = InProcessNetwork()
    a = InProcessTransport(network, "a")
    with pytest.raises(TransportError, match="name must be unique in the network, got 'a'"):
        InProcessTransport(network, "a")
    with pytest.raises(TransportError, match="agent 'b' is unknown"):
        a.notify("b", b"")
    with pytest.raises(TransportError, match="not registered"):
        a.prepare(None, [Ranges(64, 8, 0, 8, 1)], "cpu")
