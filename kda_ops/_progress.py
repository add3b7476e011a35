"""The progress line of the commands."""

import contextlib
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
