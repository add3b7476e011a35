"""Handshakes over TCP: what a peer sends, or does not, costs nobody else anything."""

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kda_ops.transfer import wire
from kda_ops.transfer.messages import MAX_HANDSHAKE
from kda_ops.transfer.wire import HandshakeServer, tcp_caller

PATIENCE_S = 30


@pytest.fixture
def server() -> Iterator[HandshakeServer]:
    made = HandshakeServer(lambda message: b"<" + message + b">", timeout_s=0.5, clients=4)
    yield made
    made.close()


def connect(server: HandshakeServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=PATIENCE_S)


def ended(client: socket.socket) -> bool:
    """Whether the server ends the connection without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def check_alive(server: HandshakeServer) -> None:
    assert tcp_caller({0: server.address})(0, b"hello") == b"<hello>"


@pytest.mark.parametrize("message", [b"", b"x", bytes(range(256)) * 5000])
def test_messages_arrive_whole(server: HandshakeServer, message: bytes) -> None:
    assert tcp_caller({3: server.address})(3, message) == b"<" + message + b">"


def test_it_listens_on_loopback(server: HandshakeServer) -> None:
    assert server.address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("!I", MAX_HANDSHAKE + 1) + b"x" * 100,
        b"\xff\xff\xff\xff",
        struct.pack("!I", 100) + b"x" * 99,
        b"\x00\x00",
        b"",
    ],
    ids=["too long", "longest", "one byte short", "half a header", "nothing"],
)
def test_a_client_that_does_not_finish_is_disconnected(
    server: HandshakeServer, sent: bytes
) -> None:
    begin = time.monotonic()
    with connect(server) as client:
        client.sendall(sent)
        check_alive(server)
        assert ended(client)
    assert time.monotonic() - begin < PATIENCE_S
    check_alive(server)


def test_a_client_that_dribbles_is_disconnected(server: HandshakeServer) -> None:
    """The limit is on the whole message, not on the time between two bytes."""

    def dribble(client: socket.socket) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            client.sendall(b"x")
            time.sleep(0.02)

    with connect(server) as client:
        client.sendall(struct.pack("!I", MAX_HANDSHAKE))
        with pytest.raises(OSError, match=r"reset|pipe|[Aa]borted"):
            dribble(client)
    check_alive(server)


def test_only_so_many_clients_at_once(server: HandshakeServer) -> None:
    waiting = [connect(server) for _ in range(4)]
    for client in waiting:
        client.sendall(b"\x00")
    deadline = time.monotonic() + PATIENCE_S
    with connect(server) as client:
        assert ended(client)
    for client in waiting:
        assert ended(client)
        client.close()
    while time.monotonic() < deadline:
        try:
            return check_alive(server)
        except ConnectionError:  # the threads of the others have not ended yet
            time.sleep(0.01)
    raise AssertionError("the server does not answer any more")


def test_an_error_of_accept_does_not_end_it(
    server: HandshakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, failed = server._socket, threading.Event()

    class Failing:
        def accept(self) -> None:
            failed.set()
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(server, "_socket", Failing())
    assert failed.wait(PATIENCE_S)
    monkeypatch.setattr(server, "_socket", listening)
    check_alive(server)


def test_a_client_without_a_thread_is_disconnected(
    server: HandshakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for _ in range(5):  # more than its slots: they are given back
            with connect(server) as client:
                assert ended(client)
    check_alive(server)


def test_closed_means_closed() -> None:
    server = HandshakeServer(lambda message: message)
    server.close()
    with pytest.raises(OSError, match="refused"):
        tcp_caller({0: server.address})(0, b"")
    server.close()


def test_errors_of_a_caller() -> None:
    with pytest.raises(ConnectionError, match="no address of rank 1"):
        tcp_caller({})(1, b"")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            tcp_caller({0: silent.getsockname()}, timeout_s=0.2)(0, b"hello")
        assert 0.1 < time.monotonic() - begin < PATIENCE_S


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (struct.pack("!I", MAX_HANDSHAKE + 1), "message must have at most"),
        (struct.pack("!I", 5) + b"abc", "closed in the middle of a message"),
        (b"", "closed in the middle of a message"),
    ],
)
def test_answers_that_do_not_end(answer: bytes, match: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                wire.receive(client, time.monotonic() + PATIENCE_S)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConnectionError, match=match):
            tcp_caller({0: listening.getsockname()})(0, b"hello")
        thread.join()
