"""What an engine reports: how reads and offers ended, and what it has done so far."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class TransferError(RuntimeError):
    """A connection or read that failed for another reason than its arguments."""


class ReadResult(NamedTuple):
    """How a read ended.

    Attributes:
        request: Its id.
        outcome: `"done"`, `"failed"`, `"timeout"` or `"cancelled"`.
        error: What went wrong, empty for `"done"`.
        in_flight: The transport may still write the request's local pages; see `Progress.drained`.
        seconds: Time from `read` to the end.
        spoiled: Local blocks, per group, whose contents are or may become undefined: never use them
            as they are. Empty lists if nothing had been read when it failed, and for `"done"`.
    """

    request: str
    outcome: str
    error: str
    in_flight: bool
    seconds: float
    spoiled: tuple[tuple[int, ...], ...] = ()


class Release(NamedTuple):
    """The pages of an offered request may be reused.

    Attributes:
        request: Its id.
        outcome: `"done"` when all consumers sent their notice, `"expired"` when they did not in
            time, `"withdrawn"` when the owner withdrew it.
    """

    request: str
    outcome: str


class Progress(NamedTuple):
    """What has ended since the last `poll`.

    Attributes:
        finished: Reads of this rank.
        released: Requests that this rank offered.
        drained: Requests whose reads ended `in_flight` and are now over.
    """

    finished: list[ReadResult]
    released: list[Release]
    drained: list[str]


@dataclass
class Counters:
    """What an engine has done.

    Attributes:
        handshakes: Answered as a source, completed as a reader.
        refused: Handshakes answered with an error.
        asks: Reads of a source rank's board, two per source rank and request.
        reads: Reads of pages posted to the transport; one per source rank and request.
        ranges: Ranges in them.
        bytes: Bytes received, per `group.segment`.
        outcomes: Requests read, by outcome.
        releases: Offers, by outcome.
        stray_notices: Notices that were malformed or matched no current offer.
        latency: Requests read, by `ceil(log2(milliseconds))`.
    """

    handshakes: int = 0
    refused: int = 0
    asks: int = 0
    reads: int = 0
    ranges: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    releases: Counter[str] = field(default_factory=Counter)
    stray_notices: int = 0
    latency: Counter[int] = field(default_factory=Counter)
