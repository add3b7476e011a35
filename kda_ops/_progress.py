"""The progress line of the commands."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def progress(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Prints one line with what is being done and, at the end, how long it took.

    It goes to `stream`, standard output if None; on a terminal it counts the seconds.
    """
    stream = sys.stdout if stream is None else stream
    start, done = time.perf_counter(), threading.Event()
    live = stream.isatty()

    def tick() -> None:
        while not done.wait(1.0):
            seconds = time.perf_counter() - start
            print(f"\r{what} ... {seconds:.0f} s", end="", file=stream, flush=True)

    print(f"{what} ...", end="", file=stream, flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    if live:
        ticker.start()
    try:
        yield
    finally:
        done.set()
        if live:
            ticker.join()
        beginning = f"\r{what} ..." if live else ""
        print(f"{beginning} {time.perf_counter() - start:.1f} s", file=stream, flush=True)


class Bar:
    """A progress bar of the commands: on a terminal one line, elsewhere a line after each tenth.

    Args:
        total: Steps in all.
        done: Steps that are done already.
        stream: Where it goes, standard output if None.
    """

    WIDTH = 24

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.total, self.done, self.written = total, done, 0
        self.live = self.stream.isatty()

    def __enter__(self) -> "Bar":
        return self

    def update(self, done: int, text: str) -> None:
        """Shows how many steps are done, with a text."""
        tenth, before = 10 * done // self.total, 10 * self.done // self.total
        self.done = done
        line = f"{done:>{len(str(self.total))}}/{self.total}   {text}"
        if self.live:
            full = self.WIDTH * done // self.total
            line = f"[{'#' * full}{'.' * (self.WIDTH - full)}] {line}"
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:{self.written}}", end="", file=self.stream, flush=True)
            self.written = len(line)
        elif tenth > before:
            print(line, file=self.stream, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.written:
            print(file=self.stream, flush=True)
