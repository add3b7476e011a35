"""The source side of an engine: it answers handshakes, and keeps offers until all have read."""

import logging
import threading
from dataclasses import dataclass, field

from kda_ops.transfer.geometry import check_compatible
from kda_ops.transfer.messages import (
    Card,
    decode_hello,
    decode_notice,
    encode_card,
    encode_refusal,
)
from kda_ops.transfer.plan import consumer_ranks, source_ranks
from kda_ops.transfer.results import Counters, Release
from kda_ops.transfer.schema import GeometryError, take_name
from kda_ops.transfer.seal import seal, unseal

REMEMBERED_CONSUMERS = 65536

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Offer:
    expires: float
    noticed: dict[str, set[int]] = field(default_factory=dict)


class Offers:
    """What a rank has promised to keep.

    Args:
        card: How the rank answers a handshake.
        counters: Of the engine.
        secret: Likewise.
    """

    def __init__(self, card: Card, counters: Counters, secret: bytes) -> None:
        self._card, self._answer, self._secret = card, encode_card(card), secret
        self._counters = counters
        self._offers: dict[str, _Offer] = {}
        self._released: list[Release] = []
        # by engine and rank: ranks of the engine, and the agent that may send notices for it
        self._consumers: dict[tuple[str, int], tuple[int, str]] = {}
        self._lock = threading.Lock()

    def answer(self, message: bytes) -> bytes:
        """See `TransferEngine.answer`."""
        own = self._card
        known = False
        try:
            hello = unseal(self._secret, message)
            known = True
            reader = decode_hello(hello)
            if reader.engine == own.engine:
                raise GeometryError(f"engine of handshake must not be the own one, {own.engine!r}")
            check_compatible(own.geometry, reader.geometry)
            tp_size = reader.geometry.tp_size
            sources = source_ranks(own.geometry.tp_size, tp_size, reader.rank)
            if own.rank not in sources:
                raise GeometryError(
                    f"rank {reader.rank} of {tp_size} must read from ranks "
                    f"{list(sources)}, got {own.rank}"
                )
        except ValueError as error:
            log.warning("refused a handshake: %s", error)
            with self._lock:
                self._counters.refused += 1
            refusal = encode_refusal(error)
            # who lacks the secret could not open it
            return seal(self._secret, refusal, message) if known else refusal
        with self._lock:
            self._consumers.pop((reader.engine, reader.rank), None)
            self._consumers[reader.engine, reader.rank] = (tp_size, reader.agent)
            while len(self._consumers) > REMEMBERED_CONSUMERS:
                self._consumers.pop(next(iter(self._consumers)))
            self._counters.handshakes += 1
        return seal(self._secret, self._answer, message)

    def offer(self, request: str, expires: float) -> None:
        """Keeps a request until `expires`; see `TransferEngine.offer`."""
        take_name("request", request)
        if request in self._offers:
            raise ValueError(f"request must not be offered twice, got {request!r}")
        self._offers[request] = _Offer(expires)

    def withdraw(self, request: str) -> None:
        """See `TransferEngine.withdraw`."""
        if request not in self._offers:
            raise ValueError(f"request must be offered, got {request!r}")
        self._release(request, "withdrawn")

    def count(self, notices: list[tuple[str, bytes]]) -> None:
        """Takes notices of consumers, with the names of the agents that sent them."""
        for agent, message in notices:
            try:
                notice = decode_notice(message)
                with self._lock:
                    tp_size, known = self._consumers.get((notice.engine, notice.rank), (0, ""))
                offer = self._offers.get(notice.request)
                if known != agent or offer is None:
                    raise GeometryError(f"nothing is offered to it as {notice.request!r}")
                expected = consumer_ranks(self._card.geometry.tp_size, tp_size, self._card.rank)
            except ValueError as error:
                self._counters.stray_notices += 1
                log.warning("stray notice of %s: %s", agent, error)
                continue
            ranks = offer.noticed.setdefault(notice.engine, set())
            ranks.add(notice.rank)
            if len(ranks) == len(expected):
                self._release(notice.request, "done")

    def expire(self, now: float) -> None:
        """Ends the offers whose time is over."""
        for request in [r for r, offer in self._offers.items() if now >= offer.expires]:
            log.warning("offer of %s expired", request)
            self._release(request, "expired")

    def take_released(self) -> list[Release]:
        """What has been released since the last call."""
        released, self._released = self._released, []
        return released

    def _release(self, request: str, outcome: str) -> None:
        del self._offers[request]
        self._counters.releases[outcome] += 1
        self._released.append(Release(request, outcome))
