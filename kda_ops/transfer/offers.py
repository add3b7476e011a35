"""The source side of an engine: answers handshakes, and keeps offers until all have read them."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kda_ops.transfer.board import ANY_BLOCKS, Board, blocks_digest
from kda_ops.transfer.geometry import check_compatible
from kda_ops.transfer.messages import (
    Card,
    Notice,
    decode_hello,
    decode_notice,
    encode_card,
    encode_refusal,
)
from kda_ops.transfer.plan import consumer_ranks, source_ranks
from kda_ops.transfer.results import Counters, Release
from kda_ops.transfer.schema import GeometryError
from kda_ops.transfer.seal import seal, unseal

REMEMBERED_CONSUMERS = 65536
REMEMBERED_NAMES = 65536

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Offer:
    number: int
    blocks: bytes
    pages: set[tuple[int, int]]
    expires: float
    noticed: dict[str, set[int]] = field(default_factory=dict)


class Offers:
    """What a rank has promised to keep.

    Args:
        card: The rank's answer to a handshake.
        board: Publishes the offers to readers.
        counters: The engine's counters.
        secret: The engine's secret.
    """

    def __init__(self, card: Card, board: Board, counters: Counters, secret: bytes) -> None:
        self._card, self._answer, self._secret = card, encode_card(card), secret
        self._board, self._counters = board, counters
        self._offers: dict[str, _Offer] = {}
        self._pages: dict[tuple[int, int], int] = {}
        self._names: OrderedDict[str, None] = OrderedDict()
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
            # a peer without the secret could not open it
            return seal(self._secret, refusal, message) if known else refusal
        with self._lock:
            self._consumers.pop((reader.engine, reader.rank), None)
            self._consumers[reader.engine, reader.rank] = (tp_size, reader.agent)
            while len(self._consumers) > REMEMBERED_CONSUMERS:
                self._consumers.pop(next(iter(self._consumers)))
            self._counters.handshakes += 1
        return seal(self._secret, self._answer, message)

    def offer(
        self,
        request: str,
        blocks: Sequence[Sequence[int]] | None,
        pages: set[tuple[int, int]],
        expires: float,
    ) -> None:
        """Keeps a request's pages until `expires`; see `TransferEngine.offer`."""
        if request in self._offers:
            raise ValueError(f"request must not be offered twice, got {request!r}")
        if blocks is None and request in self._names:
            raise ValueError(
                f"blocks must be given of a request that was offered before, got None for "
                f"{request!r}"
            )
        digest = ANY_BLOCKS if blocks is None else blocks_digest(blocks)
        number = self._board.put_up(request, digest)
        self._offers[request] = _Offer(number, digest, pages, expires)
        for page in pages:  # requests with a common prefix share pages
            self._pages[page] = self._pages.get(page, 0) + 1
        self._names[request] = None
        self._names.move_to_end(request)
        while len(self._names) > REMEMBERED_NAMES:
            self._names.popitem(last=False)

    def check_not_offered(self, pages: set[tuple[int, int]]) -> None:
        """Checks that a read may write these pages, by group.

        Raises:
            ValueError: One is on offer and must not change.
        """
        offered = pages & self._pages.keys()
        if offered:
            i, page = min(offered)
            raise ValueError(f"local group {i} must hold pages that are not on offer, got {page}")

    def renew(self, request: str, expires: float) -> None:
        """See `TransferEngine.renew`."""
        self._offered(request).expires = expires

    def withdraw(self, request: str) -> None:
        """See `TransferEngine.withdraw`."""
        self._offered(request)
        self._release(request, "withdrawn")

    def withdraw_all(self) -> None:
        """Withdraws everything."""
        for request in list(self._offers):
            self._release(request, "withdrawn")

    def _offered(self, request: str) -> _Offer:
        if request not in self._offers:
            raise ValueError(f"request must be offered, got {request!r}")
        return self._offers[request]

    def count(self, notices: list[tuple[str, bytes]]) -> None:
        """Counts notices of consumers, given with the names of their senders' agents."""
        for agent, message in notices:
            try:
                notice = decode_notice(message)
                with self._lock:
                    tp_size, known = self._consumers.get((notice.engine, notice.rank), (0, ""))
                offer = self._offers.get(notice.request)
                if known != agent or offer is None or not _is_of(notice, offer):
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
        """Ends expired offers."""
        for request in [r for r, offer in self._offers.items() if now >= offer.expires]:
            log.warning("offer of %s expired", request)
            self._release(request, "expired")

    def take_released(self) -> list[Release]:
        """The releases since the last call."""
        released, self._released = self._released, []
        return released

    def _release(self, request: str, outcome: str) -> None:
        # first: nobody who asks from now on may be told that the pages are unchanged
        self._board.take_down(request)
        offer = self._offers.pop(request)
        for page in offer.pages:
            self._pages[page] -= 1
            if not self._pages[page]:
                del self._pages[page]
        self._counters.releases[outcome] += 1
        self._released.append(Release(request, outcome))


def _is_of(notice: Notice, offer: _Offer) -> bool:
    """Whether a notice is for this offer and not for an earlier one of the same name.

    A reader that needed no bytes did not ask for the number.
    """
    if notice.offer:
        return notice.offer == offer.number
    return offer.blocks == ANY_BLOCKS or notice.blocks == offer.blocks.hex()
