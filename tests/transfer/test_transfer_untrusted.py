"""An engine against peers that lie, flood or do not know the secret."""

import copy
import json
import random
from typing import Any

import pytest

from kda_ops.transfer.board import blocks_digest
from kda_ops.transfer.messages import (
    MAX_HELLO,
    Notice,
    decode_card,
    decode_hello,
    decode_notice,
    encode_notice,
)
from kda_ops.transfer.results import TransferError
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.seal import check_secret, seal, unseal
from kda_ops.transfer.transport import InProcessNetwork, InProcessTransport
from tests.support.transfer_fleet import REMOTE, Fleet, Side, content, geometry

SECRET, OTHER = b"s" * 32, b"t" * 32


def pair(source: bytes = b"", reader: bytes = b"") -> tuple[Side, Side]:
    """A source and a reader, each with a secret or none."""
    network = InProcessNetwork()
    return (
        Side(InProcessTransport(network, "P0"), geometry(1), 0, "P", secret=source),
        Side(InProcessTransport(network, "D0"), geometry(1), 0, "D", secret=reader),
    )


# ---------------------------------------------------------------------- the secret


@pytest.mark.parametrize("secret", [b"", b"s" * 16, SECRET])
def test_engines_with_the_same_secret_connect(secret: bytes) -> None:
    source, reader = pair(secret, secret)
    source.put("r", content(24, 0), REMOTE)
    reader.engine.connect("P", 1, lambda rank, hello: source.engine.answer(hello))
    reader.engine.read("r", "P", [[4], [1, 2, 8]], REMOTE)
    assert reader.engine.poll().finished[0].outcome == "done"
    assert [tuple(r) for r in source.engine.poll().released] == [("r", "done")]
    reader.write_state(4, content(24, 0))
    reader.write_kv([1, 2, 8], content(24, 0))
    reader.check()


@pytest.mark.parametrize(
    ("secrets", "refused", "match"),
    [
        ((SECRET, OTHER), 1, "message must be sealed with the secret of this engine"),
        ((SECRET, b""), 1, "rank 0 refused: message must be sealed with the secret of this engine"),
        ((b"", SECRET), 1, "message must be sealed with the secret of this engine"),
    ],
    ids=["another", "only the source", "only the reader"],
)
def test_engines_with_different_secrets_do_not_connect(
    secrets: tuple[bytes, bytes], refused: int, match: str
) -> None:
    source, reader = pair(*secrets)
    with pytest.raises(GeometryError, match=match):
        reader.engine.connect("P", 1, lambda rank, hello: source.engine.answer(hello))
    assert source.engine.counters.refused == refused
    assert reader.engine.transport.peers == {}


def test_nothing_of_an_answer_without_the_secret_reaches_the_transport() -> None:
    """The transport's metadata are the only bytes that only the transport can check."""
    source, reader = pair(SECRET, SECRET)
    reached: list[bytes] = []
    reader.engine.transport.add_peer = reached.append  # type: ignore[method-assign]

    def spoiled(rank: int, hello: bytes) -> bytes:
        answer = bytearray(source.engine.answer(hello))
        answer[answer.index(b'"agent": "') + 12] ^= 1
        return bytes(answer)

    with pytest.raises(GeometryError, match="must be sealed"):
        reader.engine.connect("P", 1, spoiled)
    assert reached == []


def test_an_old_answer_matches_no_other_hello() -> None:
    source, reader = pair(SECRET, SECRET)
    answers: list[bytes] = []

    def keep(rank: int, hello: bytes) -> bytes:
        answers.append(source.engine.answer(hello))
        return answers[-1]

    reader.engine.connect("P", 1, keep)
    other = Side(InProcessTransport(InProcessNetwork(), "E0"), geometry(1), 0, "E", secret=SECRET)
    with pytest.raises(GeometryError, match="must be sealed"):
        other.engine.connect("P", 1, lambda rank, hello: answers[0])
    # nor does a hello come back as an answer
    with pytest.raises(GeometryError, match="must be sealed"):
        other.engine.connect("P", 1, lambda rank, hello: hello)


def test_a_seal_holds_every_bit() -> None:
    sealed = seal(SECRET, b"message", b"hello")
    assert unseal(SECRET, sealed, b"hello") == b"message"
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(GeometryError):
            unseal(SECRET, bytes(changed), b"hello")
    for short in range(len(sealed)):
        with pytest.raises(GeometryError):
            unseal(SECRET, sealed[:short], b"hello")
    with pytest.raises(GeometryError):
        unseal(SECRET, sealed, b"hallo")


def test_invalid_secrets() -> None:
    for secret, match in ((b"short", "at least 16 bytes, got 5 bytes"), ("s" * 32, "got str")):
        with pytest.raises(ValueError, match=match):
            check_secret(secret)
        with pytest.raises(ValueError, match=match):
            pair(secret)


# ---------------------------------------------------------------------- messages


def deep(depth: int) -> Any:
    """A list in a list."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_errors_do_not_print_what_is_too_deep_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth limits of the parser and of Python's repr are different."""
    who = {"version": 2, "engine": "P", "rank": 0}
    for found in (
        {"error": deep(100_000)},
        who | {"request": deep(100_000)},
        who | {"agent": "a", "geometry": {"version": deep(100_000), "groups": []}},
        {**who, "version": deep(100_000), "request": "r"},
    ):
        monkeypatch.setattr("kda_ops.transfer.schema.json.loads", lambda _, made=found: made)
        for decode in (decode_hello, decode_notice, lambda m: decode_card(m, "P", 0)):
            with pytest.raises(GeometryError):
                decode(b"")


def test_a_refusal_is_safe_for_a_log() -> None:
    for error, shown in (
        ("rows\nFAKE 12:00 \x1b[31mred \ud800", r"refused: rows\?FAKE 12:00 \?\[31mred \?$"),
        ({"a": 1}, "refused: a dict$"),
        (None, "refused: None$"),
        ("x" * 5000, "refused: x{1000}$"),
    ):
        answer = json.dumps({"version": 2, "error": error}).encode()
        with pytest.raises(GeometryError, match=shown):
            decode_card(answer, "P", 0)


def test_a_hello_is_short() -> None:
    source, _ = pair()
    answer = json.loads(source.engine.answer(b'"' + b"x" * MAX_HELLO + b'"'))
    assert f"at most {MAX_HELLO} bytes, got {MAX_HELLO + 2}" in answer["error"]


BAD = [
    *(None, True, 0, -1, 1, 2, 7, 1 << 31, (1 << 40) + 1, 1 << 64, 10**4000, 1.5),
    *(float("nan"), float("inf"), "", "\0", "\ud800", "\u202e", "é" * 256, "x" * 5000),
    *([], {}, [[]], {"a": 1}, [1 << 64] * 3, "SD", "state", "attention", "cuda", "uint8"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in JSON."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [p for key, item in items for p in ((*path, key), *places(item, (*path, key)))]


def mutated(rng: random.Random, honest: Any) -> bytes:
    """A message with some fields or bytes replaced, repeated, removed or cut off."""
    value = copy.deepcopy(honest)
    for _ in range(rng.choice([0, 1, 1, 2])):
        *path, last = rng.choice(places(value))
        at = value
        for key in path:
            at = at[key]
        action = rng.random()
        if action < 0.7:
            at[last] = copy.deepcopy(rng.choice(BAD))
        elif action < 0.8:
            del at[last]
        elif isinstance(at, list):
            at.append(copy.deepcopy(at[last]))
        else:
            at["surplus"] = rng.choice(BAD)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    message = bytearray(text.encode("utf-8", "surrogatepass"))
    action = rng.random()
    if action < 0.2:
        for _ in range(rng.randint(1, 5)):
            message[rng.randrange(len(message))] = rng.randrange(256)
    elif action < 0.3:
        del message[rng.randrange(len(message)) :]
    elif action < 0.35:
        message = bytearray(rng.randbytes(rng.randrange(500)))
    elif action < 0.4:
        message = bytearray(message.decode("utf-8", "replace").encode("utf-16"))
    return bytes(message)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_messages_are_rejected_or_harmless(seed: int) -> None:
    """Any bytes give an answer, a clear error or a stray, and nothing rejected is kept."""
    rng = random.Random(seed)
    network = InProcessNetwork()
    fleet = Fleet(1, 1, lambda name: InProcessTransport(network, name))
    source, reader = fleet.sources[0].engine, fleet.readers[0].engine
    seen: dict[str, Any] = {}

    def call(rank: int, hello: bytes) -> bytes:
        answer = source.answer(hello)
        seen.update(hello=json.loads(hello), card=json.loads(answer))
        return answer

    reader.connect("P", 1, call)
    notice = Notice("D", 0, "r", 0, blocks_digest([[3], [5, 6, 7]]).hex())
    seen["notice"] = json.loads(encode_notice(notice))
    source.offer("r", REMOTE)
    refused = connected = released = 0
    for _ in range(300):
        answer = json.loads(source.answer(mutated(rng, seen["hello"])))
        refused += answer.keys() == {"version", "error"}
        assert "error" in answer or answer == seen["card"]
        reader.disconnect("P")
        card = mutated(rng, seen["card"])
        try:
            reader.connect("P", 1, lambda rank, hello, card=card: card)
            connected += 1
        except (GeometryError, TransferError) as error:
            str(error).encode()
            assert (reader.transport.open_lists, reader.transport.peers) == (0, {})
        source.transport.inbox.append(("D0", mutated(rng, seen["notice"])))
        for release in source.poll().released:
            released += 1
            source.offer(release.request, REMOTE)
    assert source.counters.refused == refused > 100
    assert 0 < connected < 200
    # an honest reader whose agent a mutated hello has not renamed is still heard
    reader.disconnect("P")
    reader.connect("P", 1, call)
    source.transport.inbox.append(("D0", json.dumps(seen["notice"]).encode()))
    assert [tuple(r) for r in source.poll().released] == [("r", "done")]
    assert released > 0
