"""The transport protocol, and an implementation that copies within a process."""

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from kda_ops.transfer.schema import decode_json, take_fields, take_list, take_name

ACTIVE, DONE, FAILED = "active", "done", "failed"
MEMORIES = ("cpu", "cuda")


class TransportError(RuntimeError):
    """The transport rejected or lost something; the engine fails what depends on it."""


class Region(NamedTuple):
    """Registered memory: `nbytes` from an address, on the GPU `device` if it is GPU memory."""

    address: int
    nbytes: int
    device: int


class Ranges(NamedTuple):
    """`number` ranges of `nbytes`, `stride` bytes apart."""

    address: int
    nbytes: int
    device: int
    stride: int
    number: int


class Transport(Protocol):
    """One-sided reads between registered memory of agents, and short messages.

    Calls come from one thread, `metadata` after all `register`. Everything but `status` and `close`
    may raise `TransportError`. A memory is `"cpu"` or `"cuda"`; both ends of a read may differ.

    Attributes:
        name: Name of this agent, unique among those that connect.
    """

    name: str

    def register(self, regions: Sequence[Region], memory: str) -> Any:
        """Makes memory readable by peers and writable by this agent's reads; returns a handle."""

    def deregister(self, registration: Any) -> None:
        """The inverse. No read may be active."""

    def metadata(self) -> bytes:
        """The argument for a peer's `add_peer`."""

    def add_peer(self, metadata: bytes) -> str:
        """Adds an agent, from untrusted metadata; returns its name.

        It may have been added before; one `remove_peer` removes it.
        """

    def remove_peer(self, peer: str) -> None:
        """Removes an agent. No read from it may be active."""

    def prepare(self, peer: str | None, ranges: Sequence[Ranges], memory: str) -> Any:
        """A list of registered ranges to refer to by index; with None this agent's own.

        Index i of the list is range `i - first` of the entry it falls into, entries in order.
        """

    def release(self, prepared: Any) -> None:
        """Frees a prepared list. No read may use it."""

    def read(self, local: Any, local_indices: Any, remote: Any, remote_indices: Any) -> Any:
        """Starts one read of pairs of ranges; returns a handle.

        It reads memory as it is between this call and its end, never an earlier copy.
        """

    def status(self, read: Any) -> str:
        """`"active"`, `"done"` or `"failed"`. Only an active read still touches local memory."""

    def finish(self, read: Any) -> None:
        """Frees a read that is not active."""

    def notify(self, peer: str, message: bytes) -> None:
        """Sends a message; it may get lost."""

    def notices(self) -> list[tuple[str, bytes]]:
        """Messages received since the last call, with their senders' names."""

    def close(self) -> None:
        """Leaves the network."""


@dataclass(eq=False)
class InProcessNetwork:
    """Registry through which the transports of a process find each other."""

    agents: dict[str, "InProcessTransport"] = field(default_factory=dict)


@dataclass(eq=False)
class _Read:
    pairs: list[tuple[tuple[int, int], tuple[int, int]]]
    peer: "InProcessTransport"
    copied: int = 0
    state: str = ACTIVE


@dataclass(eq=False)
class InProcessTransport:
    """Copies bytes between addresses of this process, for tests and for running both sides in one.

    A read progresses when its status is queried.

    Attributes:
        network: The registry of peers.
        name: Name of this agent.
        copies_per_poll: Ranges copied per `status` call.
    """

    network: InProcessNetwork
    name: str
    copies_per_poll: int = 1 << 30
    registered: list[list[Region]] = field(default_factory=list)
    peers: dict[str, "InProcessTransport"] = field(default_factory=dict)
    inbox: list[tuple[str, bytes]] = field(default_factory=list)
    open_reads: int = 0
    open_lists: int = 0

    def __post_init__(self) -> None:
        if self.name in self.network.agents:
            raise TransportError(f"name must be unique in the network, got {self.name!r}")
        self.network.agents[self.name] = self

    def register(self, regions: Sequence[Region], memory: str) -> list[Region]:
        if memory != "cpu":
            raise TransportError(f"memory must be cpu in a process, got {memory}")
        self.registered.append(list(regions))
        return self.registered[-1]

    def deregister(self, registration: list[Region]) -> None:
        self.registered = [r for r in self.registered if r is not registration]

    def metadata(self) -> bytes:
        regions = [list(region) for regions in self.registered for region in regions]
        return json.dumps({"agent": self.name, "regions": regions}).encode()

    def add_peer(self, metadata: bytes) -> str:
        try:
            found = take_fields(
                "metadata", decode_json(metadata), {"agent": take_name, "regions": take_list}
            )
        except ValueError as error:
            raise TransportError(str(error)) from None
        self.peers[found["agent"]] = self._alive(found["agent"])
        return found["agent"]

    def remove_peer(self, peer: str) -> None:
        del self.peers[peer]

    def prepare(self, peer: str | None, ranges: Sequence[Ranges], memory: str) -> Any:
        if memory != "cpu":
            raise TransportError(f"memory must be cpu in a process, got {memory}")
        owner = self if peer is None else self._peer(peer)
        listed = [(r.address + i * r.stride, r.nbytes) for r in ranges for i in range(r.number)]
        for address, nbytes in listed:
            owner._check_registered(address, nbytes)
        self.open_lists += 1
        return owner, listed

    def release(self, prepared: Any) -> None:
        self.open_lists -= 1

    def read(self, local: Any, local_indices: Any, remote: Any, remote_indices: Any) -> _Read:
        owner, source = remote
        self._peer(owner.name)
        pairs = [
            (local[1][i], source[j]) for i, j in zip(local_indices, remote_indices, strict=True)
        ]
        if any(a[1] != b[1] for a, b in pairs):
            raise TransportError("ranges of a read must have equal lengths")
        self.open_reads += 1
        return _Read(pairs, owner)

    def status(self, read: _Read) -> str:
        if read.state != ACTIVE:
            return read.state
        for (to, nbytes), (source, _) in read.pairs[read.copied :][: self.copies_per_poll]:
            try:
                self._peer(read.peer.name)
                self._check_registered(to, nbytes)
                read.peer._check_registered(source, nbytes)
            except TransportError:
                read.state = FAILED
                return FAILED
            ctypes.memmove(to, source, nbytes)
            read.copied += 1
        if read.copied == len(read.pairs):
            read.state = DONE
        return read.state

    def finish(self, read: _Read) -> None:
        if read.state == ACTIVE:
            raise TransportError("a read must not be active when it is finished")
        self.open_reads -= 1

    def notify(self, peer: str, message: bytes) -> None:
        self._peer(peer).inbox.append((self.name, message))

    def notices(self) -> list[tuple[str, bytes]]:
        found, self.inbox = self.inbox, []
        return found

    def close(self) -> None:
        self.network.agents.pop(self.name, None)

    def _alive(self, name: str) -> "InProcessTransport":
        if name not in self.network.agents:
            raise TransportError(f"agent {name!r} is gone")
        return self.network.agents[name]

    def _peer(self, name: str) -> "InProcessTransport":
        if name not in self.peers:
            raise TransportError(f"agent {name!r} is unknown")
        if self._alive(name) is not self.peers[name]:
            raise TransportError(f"agent {name!r} was replaced")
        return self.peers[name]

    def _check_registered(self, address: int, nbytes: int) -> None:
        for region in (region for regions in self.registered for region in regions):
            if region.address <= address and address + nbytes <= region.address + region.nbytes:
                return
        raise TransportError(f"{nbytes} bytes at {address} of agent {self.name!r} not registered")
