"""Prefill engines in a process of their own: `python -m tests.nixl_prefill`.

Hosts the ranks of some engines over NIXL and takes commands, one JSON object per line, each with
one line in answer. It lives until its input ends.
"""

import json
import os
import select
import sys
import time
from typing import Any

from kda_ops.transfer.nixl import SHARED_MEMORY, NixlTransport
from kda_ops.transfer.wire import HandshakeServer
from tests.transfer_fleet import Side, content, geometry


class Host:
    """The engines of this process: name to ranks, `S...` over shared memory."""

    def __init__(self, engines: dict[str, int], pages: int, progress_thread: bool) -> None:
        self.sides = {
            name: [
                Side(
                    NixlTransport(
                        environment=SHARED_MEMORY if name.startswith("S") else None,
                        progress_thread=progress_thread,
                    ),
                    geometry(tp, pages=pages),
                    rank,
                    name,
                    time.monotonic,
                )
                for rank in range(tp)
            ]
            for name, tp in engines.items()
        }
        self.servers = {
            name: [HandshakeServer(side.engine.answer) for side in sides]
            for name, sides in self.sides.items()
        }
        self.released: list[tuple[str, int, str, str]] = []

    def poll(self) -> None:
        for name, sides in self.sides.items():
            for side in sides:
                for request, outcome in side.engine.poll().released:
                    self.released.append((name, side.rank, request, outcome))

    def addresses(self) -> dict[str, list[tuple[str, int]]]:
        return {name: [s.address for s in servers] for name, servers in self.servers.items()}

    def put(self, engine: str, requests: list[tuple[str, int, list[list[int]]]]) -> None:
        """Prefills requests: ids, seeds of their content, blocks."""
        made = [(request, content(24, seed), blocks) for request, seed, blocks in requests]
        for side in self.sides[engine]:
            side.put_many(made, ttl_s=60)

    def check(self) -> list[int]:
        """Own pages are as they were; how many notices were strays."""
        for sides in self.sides.values():
            for side in sides:
                side.check()
        return [s.engine.counters.stray_notices for sides in self.sides.values() for s in sides]

    def take_released(self) -> list[tuple[str, int, str, str]]:
        taken, self.released = self.released, []
        return taken


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what NIXL logs goes elsewhere
    host = Host(**json.loads(sys.stdin.readline()))
    print(json.dumps(host.addresses()), file=answers, flush=True)
    while True:
        host.poll()
        if select.select([sys.stdin], [], [], 0.001)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            command: dict[str, Any] = json.loads(line)
            result = getattr(host, command.pop("do"))(**command)
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
