"""Handshakes over TCP: length-prefixed messages with a limit and a deadline, on loopback."""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from kda_ops.transfer.messages import MAX_HANDSHAKE, MAX_HELLO
from kda_ops.transfer.peers import Call

HEADER = struct.Struct("!I")
LOOPBACK = "127.0.0.1"

log = logging.getLogger(__name__)


class HandshakeServer:
    """Answers handshakes in its own thread until it is closed.

    Args:
        answer: `TransferEngine.answer`.
        host: Interface to listen on.
        port: 0 takes a free one; see `address`.
        timeout_s: Time after which an unfinished client is disconnected.
        clients: Maximum number of connections; further ones are closed.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        timeout_s: float = 10.0,
        clients: int = 64,
    ) -> None:
        self._answer = answer
        self._timeout_s = timeout_s
        self._slots = threading.Semaphore(clients)
        self._socket = socket.create_server((host, port))
        self._address = self._socket.getsockname()[:2]
        self._socket.settimeout(0.1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._address

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:  # such as no more descriptors: others may still be served
                log.warning("handshake server: %s", error)
                self._stop.wait(0.1)
                continue
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
            except RuntimeError as error:  # no more threads
                log.warning("handshake server: %s", error)
                client.close()
                self._slots.release()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                deadline = time.monotonic() + self._timeout_s
                message = receive(client, deadline, limit=MAX_HELLO)
                send(client, self._answer(message), deadline)
        except OSError:
            pass  # the client sees its connection end
        except Exception:  # nobody joins this thread: log everything
            log.exception("handshake server: no answer")
        finally:
            self._slots.release()

    def close(self) -> None:
        """Stops listening."""
        self._stop.set()
        self._thread.join()
        self._socket.close()


def tcp_caller(addresses: Mapping[int, tuple[str, int]], *, timeout_s: float = 10.0) -> Call:
    """The `call` of `TransferEngine.connect`.

    Args:
        addresses: Host and port per rank.
        timeout_s: Timeout of one handshake.
    """

    def call(rank: int, message: bytes) -> bytes:
        if rank not in addresses:
            raise ConnectionError(f"no address of rank {rank}")
        deadline = time.monotonic() + timeout_s
        with socket.create_connection(addresses[rank], timeout=timeout_s) as connection:
            send(connection, message, deadline)
            return receive(connection, deadline)

    return call


def send(connection: socket.socket, message: bytes, deadline: float) -> None:
    """Sends one message.

    Raises:
        OSError: Lost or late.
    """
    connection.settimeout(_left(deadline))
    connection.sendall(HEADER.pack(len(message)) + message)


def receive(connection: socket.socket, deadline: float, *, limit: int = MAX_HANDSHAKE) -> bytes:
    """Receives one message of at most `limit` bytes.

    Raises:
        OSError: Lost, late or too long.
    """
    (length,) = HEADER.unpack(_exactly(connection, HEADER.size, deadline))
    if length > limit:
        raise ConnectionError(f"message must have at most {limit} bytes, got {length}")
    return _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(length - len(received), 1 << 16))
        if not part:
            raise ConnectionError("connection was closed in the middle of a message")
        received += part
    return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("message did not come in time")
    return left
