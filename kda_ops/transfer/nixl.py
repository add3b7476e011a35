"""NIXL as the transport, with which serving stacks move KV caches (extra `nixl`)."""

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nixl._api import nixl_agent, nixl_agent_config

from kda_ops.transfer.schema import take_name
from kda_ops.transfer.transport import ACTIVE, DONE, FAILED, Ranges, Region, TransportError

log = logging.getLogger(__name__)

LOOPBACK = {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp,self"}
SHARED_MEMORY = {"UCX_TLS": "sm,self"}
GPU_TRANSPORTS = ("cuda_copy", "cuda_ipc")
SEGMENTS = {"cpu": "DRAM", "cuda": "VRAM"}


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Converts NIXL's exceptions, which share no base class."""
    try:
        yield
    except Exception as error:
        raise TransportError(f"{what}: {type(error).__name__} {error}") from error


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets the environment from which UCX takes devices and transports when it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _with_gpu(environment: dict[str, str]) -> dict[str, str]:
    """Adds GPU transports if there is a GPU: UCX warns about transports a machine lacks."""
    if environment not in (LOOPBACK, SHARED_MEMORY) or not torch.cuda.is_available():
        return environment
    return {**environment, "UCX_TLS": ",".join((environment["UCX_TLS"], *GPU_TRANSPORTS))}


class NixlTransport:
    """A `Transport` over NIXL's UCX backend.

    Args:
        name: Name of the agent, unique among all that connect. None generates one.
        environment: UCX settings for this agent. The default uses loopback TCP and listens nowhere
            else; `SHARED_MEMORY` is for processes of one machine; `{}` leaves UCX to the process's
            environment, as needed between machines. If there is a GPU, `UCX_TLS` of the first two
            also gets the transports for its memory.
        error_handling: UCX's mode, `"peer"` or `"none"`. None is "peer", which detects the death
            of a peer, except for shared memory, where UCX only has "none".
        progress_thread: Whether NIXL makes progress by itself, with a thread that never sleeps.
            Without it reads and notices progress while engines are polled; over TCP and shared
            memory that means the engines of both sides.

    Raises:
        TransportError: NIXL or UCX cannot start.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        environment: dict[str, str] | None = None,
        error_handling: str | None = None,
        progress_thread: bool = False,
    ) -> None:
        self.name = uuid.uuid4().hex if name is None else name
        environment = LOOPBACK if environment is None else environment
        if error_handling is None:
            error_handling = "none" if environment == SHARED_MEMORY else "peer"
        with _errors("nixl"), _environment(_with_gpu(environment)):
            settings = nixl_agent_config(enable_prog_thread=progress_thread, backends=[])
            self._agent = nixl_agent(self.name, settings)
            self._agent.create_backend("UCX", {"ucx_error_handling_mode": error_handling})

    def register(self, regions: Sequence[Region], memory: str) -> Any:
        with _errors("register"):
            return self._agent.register_memory([(*r, "") for r in regions], SEGMENTS[memory])

    def deregister(self, registration: Any) -> None:
        with _errors("deregister"):
            self._agent.deregister_memory(registration)

    def metadata(self) -> bytes:
        with _errors("metadata"):
            return self._agent.get_agent_metadata()

    def add_peer(self, metadata: bytes) -> str:
        # NIXL 1.5 never accepts an agent's metadata again after a truncated copy
        with _errors("add_peer"):
            name = self._agent.add_remote_agent(metadata)
            try:
                return take_name("name of the agent", name.decode())
            except ValueError:
                self._agent.remove_remote_agent(name)
                raise

    def remove_peer(self, peer: str) -> None:
        with _errors("remove_peer"):
            self._agent.remove_remote_agent(peer)

    def prepare(self, peer: str | None, ranges: Sequence[Ranges], memory: str) -> Any:
        with _errors("prepare"):
            return self._agent.prep_xfer_dlist(
                "NIXL_INIT_AGENT" if peer is None else peer,
                np.array(ranges, np.uint64).reshape(-1, 5),
                SEGMENTS[memory],
            )

    def release(self, prepared: Any) -> None:
        with _errors("release"):
            self._agent.release_dlist_handle(prepared)

    def read(
        self, local: Any, local_indices: np.ndarray, remote: Any, remote_indices: np.ndarray
    ) -> Any:
        with _errors("read"):
            handle = self._agent.make_prepped_xfer(
                "READ", local, local_indices, remote, remote_indices
            )
            try:
                state = self._agent.transfer(handle)
            except Exception:
                self._agent.release_xfer_handle(handle)
                raise
        if state == "ERR":
            self.finish(handle)
            raise TransportError("read: NIXL could not post it")
        return handle

    def status(self, read: Any) -> str:
        try:
            state = self._agent.check_xfer_state(read)
        except Exception as error:
            log.warning("read: %s %s", type(error).__name__, error)
            return FAILED
        return {"DONE": DONE, "PROC": ACTIVE}.get(state, FAILED)

    def finish(self, read: Any) -> None:
        with _errors("finish"):
            self._agent.release_xfer_handle(read)

    def notify(self, peer: str, message: bytes) -> None:
        with _errors("notify"):
            self._agent.send_notif(peer, message)

    def notices(self) -> list[tuple[str, bytes]]:
        with _errors("notices"):
            found = self._agent.get_new_notifs()
        return [(peer, message) for peer, messages in found.items() for message in messages]

    def close(self) -> None:
        self._agent = None
