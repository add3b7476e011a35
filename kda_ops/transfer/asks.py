"""Asking a source rank what it offers: small one-sided reads of its board."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kda_ops.transfer.board import BUCKET_BYTES, Entry, bucket_of, find_entry
from kda_ops.transfer.peers import Source
from kda_ops.transfer.results import Counters
from kda_ops.transfer.transport import Region, Transport, TransportError

SLOTS = 1024  # answers in flight, from all sources


class Landing:
    """Landing area of buckets; register its `region`."""

    def __init__(self) -> None:
        self._memory = np.zeros((SLOTS, BUCKET_BYTES), np.uint8)
        self._free = list(range(SLOTS))

    @property
    def region(self) -> Region:
        """Its place in host memory."""
        return Region(self._memory.ctypes.data, self._memory.nbytes, 0)

    def take(self) -> int | None:
        """A slot for one answer, None if all are in use."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> bytes:
        """The contents of a slot, which is freed."""
        self._free.append(slot)
        return self._memory[slot].tobytes()


@dataclass(eq=False)
class Ask:
    """A bucket in flight into a slot."""

    read: Any
    slot: int


class Asks:
    """The asks of a rank."""

    def __init__(self, transport: Transport, landing: Landing, counters: Counters) -> None:
        self._transport, self._landing, self._counters = transport, landing, counters

    def post(self, source: Source, request: str) -> Ask | None:
        """Starts asking what a source rank offers for a request; None if no slot is free.

        Raises:
            TransportError: The source is gone.
        """
        slot = self._landing.take()
        if slot is None:
            return None
        to, at = np.array([slot], np.int32), np.array([bucket_of(request)], np.int32)
        try:
            read = self._transport.read(source.landing, to, source.board, at)
        except TransportError:
            self._landing.give(slot)
            raise
        self._counters.asks += 1
        return Ask(read, slot)

    def status(self, ask: Ask) -> str:
        """As of any read."""
        return self._transport.status(ask.read)

    def take(self, ask: Ask, request: str) -> Entry | None:
        """The answer to an ask that is no longer active; frees its slot.

        Raises:
            TransportError: The transport cannot free the read.
        """
        return find_entry(self.drop(ask), request)

    def drop(self, ask: Ask) -> bytes:
        """Frees an ask that is no longer active; returns what has arrived of its answer.

        Raises:
            TransportError: The transport cannot free the read.
        """
        bucket = self._landing.give(ask.slot)
        self._transport.finish(ask.read)
        return bucket
