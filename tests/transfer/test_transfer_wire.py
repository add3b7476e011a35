"""Handshakes over TCP: what a peer sends, or does not, affects nobody else."""

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kda_ops.transfer import wire
from kda_ops.transfer.messages import MAX_HANDSHAKE, MAX_HELLO
from kda_ops.transfer.wire import HandshakeServer, tcp_caller

PATIENCE_S = 30


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[HandshakeServer]:
    """Waits for clients for longer than any test; 0.5 s with the parameter `hasty`."""
    hasty = getattr(request, "param", None) == "hasty"
    made = HandshakeServer(
        lambda message: b"<" + message + b">",
        timeout_s=0.5 if hasty else 20 * PATIENCE_S,
        clients=4,
    )
    yield made
    made.close()


hasty = pytest.mark.parametrize("server", ["hasty"], indirect=True)


def connect(server: HandshakeServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=PATIENCE_S)


def ended(client: socket.socket) -> bool:
    """Whether the server ends the connection without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def check_alive(server: HandshakeServer) -> None:
    """It answers; on a busy machine a hasty one may first find its client too slow."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            assert tcp_caller({0: server.address})(0, b"hello") == b"<hello>"
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@pytest.mark.parametrize("message", [b"", b"x", bytes(range(256)) * 4000])
def test_messages_arrive_whole(server: HandshakeServer, message: bytes) -> None:
    assert tcp_caller({3: server.address})(3, message) == b"<" + message + b">"


def test_it_listens_on_loopback(server: HandshakeServer) -> None:
    assert server.address[0] == "127.0.0.1"


def test_an_answer_may_be_longer_than_a_hello() -> None:
    long = HandshakeServer(lambda message: message * 8)
    try:
        message = b"x" * MAX_HELLO
        assert tcp_caller({0: long.address})(0, message) == message * 8
    finally:
        long.close()


@pytest.mark.parametrize(
    "sent",
    [struct.pack("!I", MAX_HELLO + 1) + b"x" * 100, b"\xff\xff\xff\xff"],
    ids=["too long", "longest"],
)
def test_a_client_that_announces_too_much_is_disconnected(
    server: HandshakeServer, sent: bytes
) -> None:
    """At once: this server's time for a client is longer than the test's."""
    with connect(server) as client:
        client.sendall(sent)
        assert ended(client)
    check_alive(server)


@hasty
@pytest.mark.parametrize(
    "sent",
    [struct.pack("!I", 100) + b"x" * 99, b"\x00\x00", b""],
    ids=["one byte short", "half a header", "nothing"],
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


@hasty
def test_a_client_that_dribbles_is_disconnected(server: HandshakeServer) -> None:
    """The limit is on the whole message, not on the time between two bytes."""

    def dribble(client: socket.socket) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            client.sendall(b"x")
            time.sleep(0.02)

    with connect(server) as client:
        client.sendall(struct.pack("!I", MAX_HELLO))
        with pytest.raises(OSError, match=r"reset|pipe|[Aa]borted"):
            dribble(client)
    check_alive(server)


def test_the_number_of_clients_is_limited(server: HandshakeServer) -> None:
    waiting = [connect(server) for _ in range(4)]
    for client in waiting:
        client.sendall(b"\x00")
    for _ in range(2):
        with connect(server) as client:
            assert ended(client)
    for client in waiting:  # they are still served
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.close()
    check_alive(server)


def test_an_answer_that_fails_costs_only_its_client() -> None:
    def answer(message: bytes) -> bytes:
        if message == b"bad":
            raise RecursionError("too deep")
        return b"<" + message + b">"

    server = HandshakeServer(answer, clients=1)
    try:
        for _ in range(3):
            with connect(server) as client:
                client.sendall(struct.pack("!I", 3) + b"bad")
                assert ended(client)
        check_alive(server)
    finally:
        server.close()


def test_an_error_of_accept_does_not_end_the_server(
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
