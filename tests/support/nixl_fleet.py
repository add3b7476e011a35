"""Engines over real NIXL: prefill in other processes, decode in this one."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kda_ops.transfer.results import Progress
from kda_ops.transfer.wire import tcp_caller
from tests.support.transfer_faults import Counted
from tests.support.transfer_fleet import Side, content, geometry

PATIENCE_S = 180  # for what ends by itself; the machine may be slow and busy
PAGES = 420


class Prefill:
    """A process with prefill engines.

    Args:
        engines: Ranks of each, or a dictionary of `ranks` and what
            `tests.support.nixl_prefill.Host` takes.
        progress_thread: Whether NIXL answers reads while the process is not polling.
    """

    def __init__(self, engines: dict[str, Any], *, progress_thread: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nixl_prefill"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"NIXL_LOG_LEVEL": "FATAL", "OMP_NUM_THREADS": "1"},
        )
        options = {
            name: {"ranks": given} if isinstance(given, int) else given
            for name, given in engines.items()
        }
        self.addresses = self._ask(
            {"engines": options, "pages": PAGES, "progress_thread": progress_thread}
        )

    def _ask(self, message: Any) -> Any:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
            raise TimeoutError(f"the prefill process did not answer {message}")
        return json.loads(self.process.stdout.readline())

    def do(self, name: str, **arguments: Any) -> Any:
        """Runs a command in the process."""
        return self._ask({"do": name, **arguments})

    def call(self, engine: str, timeout_s: float = PATIENCE_S) -> Callable[[int, bytes], bytes]:
        """The `call` of `TransferEngine.connect`."""
        addresses = {i: tuple(a) for i, a in enumerate(self.addresses[engine])}
        return tcp_caller(addresses, timeout_s=timeout_s)

    def released(self, count: int, readers: list[Side]) -> set[tuple[Any, ...]]:
        """The next `count` releases; a notice leaves its reader while that one is polled."""
        found: set[tuple[Any, ...]] = set()
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            found |= {tuple(r) for r in self.do("take_released")}
            for reader in readers:
                reader.engine.poll()
        return found

    def stall(self) -> None:
        """From now on the process does nothing; it may be killed meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        # until the last thread has stopped, NIXL's may still answer reads
        states = os.WSTOPPED | os.WEXITED | os.WNOWAIT
        found = os.waitid(os.P_PID, self.process.pid, states)
        assert found.si_code == os.CLD_STOPPED, "the prefill process has died"

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Does nothing for a while."""
        self.stall()
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def stalled_in(self, reader: Side, request: str, *lists: Any, **options: Any) -> Iterator[None]:
        """Does nothing once it has been asked for a request, before its pages are read."""
        posted = reader.engine.counters.reads
        reader.engine.transport.before = {1: self.stall}
        reader.engine.read(request, *lists, **options)
        deadline = time.monotonic() + PATIENCE_S
        try:
            while reader.engine.counters.reads == posted:
                assert time.monotonic() < deadline, "the pages are not read"
                assert reader.engine.poll().finished == []
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the process at once, whatever it does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends the process and closes its pipes."""
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


class Decode:
    """Decode engines of this process, each with a unique name.

    Args:
        name: Of the test.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.sides: list[Side] = []

    def __call__(
        self, tp: int, *, environment: dict[str, str] | None = None, device: str = "cpu"
    ) -> list[Side]:
        """The ranks of another engine."""
        from kda_ops.transfer.nixl import NixlTransport

        name = f"D{len(self.sides)}-{self._name}"[:200]
        sides = [
            Side(
                Counted(NixlTransport(environment=environment)),
                geometry(tp, pages=PAGES, page_bytes=4096),
                rank,
                name,
                time.monotonic,
                device=device,
                timeout_s=PATIENCE_S,
            )
            for rank in range(tp)
        ]
        self.sides += sides
        return sides

    def close(self) -> None:
        """Closes every engine within its timeout; it must free everything it took from NIXL."""
        for side in self.sides:
            assert side.engine.close() == []
            assert side.engine.transport.left() == {}


def wait(sides: list[Side], enough: Callable[[list[Progress]], bool]) -> list[Progress]:
    """Polls until what has happened is enough; the progress of every rank, added up."""
    total = [Progress([], [], []) for _ in sides]
    deadline = time.monotonic() + PATIENCE_S
    while not enough(total):
        assert time.monotonic() < deadline, total
        for side, sum_of_side in zip(sides, total, strict=True):
            for into, found in zip(sum_of_side, side.engine.poll(), strict=True):
                into.extend(found)
    return total


def all_finished(total: list[Progress]) -> bool:
    """Every rank has an ended read."""
    return all(progress.finished for progress in total)


def expect(reader: Side, state: int, kv: list[int], seed: int, first_block: int = 0) -> None:
    """The expected pages of a reader for 24 tokens."""
    reader.write_state(state, content(24, seed))
    reader.write_kv(kv, content(24, seed), first_block)
