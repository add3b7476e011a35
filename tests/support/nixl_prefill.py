"""Prefill engines in a separate process: `python -m tests.support.nixl_prefill`.

Hosts the ranks of engines over NIXL and takes commands, one JSON object per line, each with
one line in answer. It lives until its input ends.
"""

import json
import os
import select
import sys
import time
from typing import Any

from kda_ops.transfer.nixl import SHARED_MEMORY, NixlTransport
from kda_ops.transfer.transport import Region
from kda_ops.transfer.wire import HandshakeServer
from tests.support.transfer_faults import Counted
from tests.support.transfer_fleet import REMOTE, Side, content, geometry

TTL_S = 3600  # no test takes as long
PATIENCE_S = 60


class Short(Counted):
    """Registers less than its engine believes."""

    def register(self, regions: list[Region], memory: str) -> Any:
        return super().register([r._replace(nbytes=r.nbytes - 100) for r in regions], memory)


class Host:
    """The engines of this process.

    Args:
        engines: Per name how many `ranks`, `shared` memory instead of TCP, `short` registrations,
            `device` for pages on a GPU, `shape` for other arguments of `geometry`.
        pages: Of each layer.
        progress_thread: Of the transports.
    """

    def __init__(
        self, engines: dict[str, dict[str, Any]], pages: int, progress_thread: bool
    ) -> None:
        self.sides = {name: [] for name in engines}
        for name, options in engines.items():
            for rank in range(options["ranks"]):
                transport = NixlTransport(
                    environment=SHARED_MEMORY if options.get("shared") else None,
                    progress_thread=progress_thread,
                )
                counted = (Short if options.get("short") else Counted)(transport)
                shape = geometry(options["ranks"], pages=pages, **options.get("shape", {}))
                device = options.get("device", "cpu")
                side = Side(counted, shape, rank, name, time.monotonic, device=device)
                self.sides[name].append(side)
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

    def put(
        self, engine: str, requests: list[tuple[str, int, list[list[int]]]], ttl_s: float = TTL_S
    ) -> None:
        """Prefills requests: ids, seeds of their content, blocks."""
        made = [(request, content(24, seed), blocks) for request, seed, blocks in requests]
        for side in self.sides[engine]:
            side.put_many(made, ttl_s=ttl_s)

    def end(self, engine: str, request: str, how: str) -> None:
        """Ends an offer, and gives its pages to another request."""
        for side in self.sides[engine]:
            if how == "withdrawn":
                side.engine.withdraw(request)
            deadline = time.monotonic() + PATIENCE_S
            while [request, how] not in [list(r[2:]) for r in self.released if r[1] == side.rank]:
                assert time.monotonic() < deadline, f"{request} is not {how}"
                self.poll()
            side.write_state(REMOTE[0][-1], content(24, 7))
            side.write_kv(REMOTE[1], content(24, 7))
            side.fill()

    def renew(self, engine: str, request: str, ttl_s: float) -> None:
        """Renews an offer."""
        for side in self.sides[engine]:
            side.engine.renew(request, ttl_s)

    def check(self) -> list[int]:
        """Checks that its pages are unchanged; returns the number of stray notices."""
        for sides in self.sides.values():
            for side in sides:
                side.check()
        return [s.engine.counters.stray_notices for sides in self.sides.values() for s in sides]

    def take_released(self) -> list[tuple[str, int, str, str]]:
        taken, self.released = self.released, []
        return taken

    def close(self) -> list[dict[str, int]]:
        """Closes all engines; returns what they have not freed."""
        sides = [side for sides in self.sides.values() for side in sides]
        self.sides = {}
        for servers in self.servers.values():
            for server in servers:
                server.close()
        return [{"reads": len(s.engine.close())} | s.engine.transport.left() for s in sides]


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
