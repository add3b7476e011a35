"""Handshakes with one field wrong, and transports that count or lose things."""

import base64
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from kda_ops.transfer.board import BUCKET_BYTES
from kda_ops.transfer.transport import ACTIVE, InProcessTransport, Transport

Call = Callable[[int, bytes], bytes]


def tampered(honest: Call, where: str, path: tuple[Any, ...], value: Any) -> Call:
    """A channel that replaces one field on its way: of the hello or of the card."""

    def change(message: bytes) -> bytes:
        decoded = json.loads(message)
        at = decoded
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return json.dumps(decoded).encode()

    def call(rank: int, message: bytes) -> bytes:
        if where == "hello":
            return honest(rank, change(message))
        return change(honest(rank, message))

    return call


GROUP = ("geometry", "groups", 0)
SEGMENT = (*GROUP, "segments", 0)
SHARED = [
    (("version",), 1),
    (("version",), "2"),
    (("engine",), 7),
    (("engine",), ""),
    (("rank",), 99),
    (("rank",), None),
    (("geometry",), None),
    (("geometry", "version"), 1),
    (("geometry", "groups"), []),
    (("surplus",), 1),
    ((*GROUP, "name"), "mamba"),
    ((*GROUP, "kind"), "attention"),
    ((*GROUP, "layout"), "SD"),
    ((*GROUP, "conv_size"), 3),
    ((*GROUP, "conv_size"), 1),
    ((*GROUP, "num_spec"), 0),
    ((*GROUP, "num_spec"), -1),
    ((*GROUP, "tp_size"), 2),
    ((*GROUP, "tp_size"), 3),
    ((*GROUP, "layers"), 3),
    ((*GROUP, "pages"), 0),
    ((*GROUP, "page_bytes"), 8),
    ((*GROUP, "pages_per_block"), 2),
    ((*GROUP, "segments"), []),
    (("geometry", "groups", 1, "block_tokens"), 4),
    ((*SEGMENT, "name"), "x"),
    ((*SEGMENT, "units"), 8),
    ((*SEGMENT, "bytes_per_unit"), 16),
    ((*SEGMENT, "dtype"), "float16"),
    ((*SEGMENT, "offset"), 1),
    ((*SEGMENT, "shape"), [4]),
    ((*SEGMENT, "shape"), [1] * 9),
    ((*SEGMENT, "shape", 0), -8),
]
CARD = [
    (("engine",), "Q"),
    (("rank",), 1),
    (("memory",), "tape"),
    (("memory",), "cuda"),
    (("agent",), "not base64!"),
    (("agent",), base64.b64encode(b"garbage").decode()),
    (("agent",), base64.b64encode(b'{"agent": "nobody", "regions": []}').decode()),
    (("regions",), []),
    (("regions", 0), []),
    (("regions", 0, 0), [1, 2]),
    (("regions", 0, 0), [1 << 63, 1 << 63, 0]),
    (("regions", 0, 0, 0), -1),
    (("regions", 0, 0, 0), 4096),
    (("regions", 0, 0, 1), 100),
    (("board",), None),
    (("board",), [4096, 1 << 20]),
    (("board", 0), 4096),
    (("board", 1), 100),
]
HELLO = [(("engine",), "P"), (("rank",), 1), (("agent",), None), (("agent",), "x" * 300)]
WRONG_FIELDS = [("hello", *c) for c in SHARED + HELLO] + [("card", *c) for c in SHARED + CARD]


class Paced(InProcessTransport):
    """Reads of pages go as fast as `copies_per_poll` says, asks are answered at once.

    Attributes:
        deaf: Whether asks are not answered.
    """

    deaf = False

    def status(self, read: Any) -> str:
        if len(read.pairs) > 1 or read.pairs[0][0][1] != BUCKET_BYTES:
            return super().status(read)
        if self.deaf:
            return ACTIVE
        pace, self.copies_per_poll = self.copies_per_poll, 1
        try:
            return super().status(read)
        finally:
            self.copies_per_poll = pace


class Counted:
    """A transport that counts unreleased resources.

    Attributes:
        open: Registrations, prepared lists and reads.
        known: Peers.
        loses_notices: Whether those it sends get lost.
        before: What happens before a read is posted, by how many reads come before that one.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self.name = transport, transport.name
        self.open: Counter[str] = Counter()
        self.known: set[str] = set()
        self.loses_notices = False
        self.before: dict[int, Callable[[], object]] = {}

    def _take(self, what: str, taken: Any) -> Any:
        self.open[what] += 1
        return taken

    def register(self, *arguments: Any) -> Any:
        return self._take("registrations", self._transport.register(*arguments))

    def deregister(self, registration: Any) -> None:
        self._transport.deregister(registration)
        self.open["registrations"] -= 1

    def add_peer(self, metadata: bytes) -> str:
        name = self._transport.add_peer(metadata)
        self.known.add(name)
        return name

    def remove_peer(self, peer: str) -> None:
        self._transport.remove_peer(peer)
        self.known.remove(peer)

    def prepare(self, *arguments: Any) -> Any:
        return self._take("lists", self._transport.prepare(*arguments))

    def release(self, prepared: Any) -> None:
        self._transport.release(prepared)
        self.open["lists"] -= 1

    def read(self, *arguments: Any) -> Any:
        now = self.before.pop(0, None)
        self.before = {count - 1: happens for count, happens in self.before.items()}
        if now is not None:
            now()
        return self._take("reads", self._transport.read(*arguments))

    def finish(self, read: Any) -> None:
        self._transport.finish(read)
        self.open["reads"] -= 1

    def notify(self, peer: str, message: bytes) -> None:
        if not self.loses_notices:
            self._transport.notify(peer, message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def left(self) -> dict[str, int]:
        """What was not released."""
        counts = {**self.open, "peers": len(self.known)}
        return {what: count for what, count in counts.items() if count}
