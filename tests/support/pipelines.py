"""Shared memory of pipelined loops in Triton's GPU dialect, and a fault of its pipeliner.

A loop with `num_stages` loads the tiles of later rounds while GEMMs of this one are under way. A
tile that only GEMMs read gets a buffer more than the others, since a warp-group GEMM may still read
it when the copy that replaces it starts. One that is also read into registers does not (Triton 3.6
and 3.7), and is overwritten, unless the GEMMs are waited for within their round.
"""

import re
from collections.abc import Iterator

WAIT = re.compile(r"warp_group_dot_wait .*pendings = ([1-9]\d*)")
DOT = re.compile(r"warp_group_dot (%\w+), (%\w+),.*isAsync = true")
VIEW = re.compile(r"(%\w+) = ttg\.memdesc_(index|trans) (%\w+)")
BUFFERS = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def loops(lines: list[str]) -> Iterator[list[str]]:
    """The bodies of the loops in which GEMMs are under way at the end of a round."""
    for i, line in enumerate(lines):
        if WAIT.search(line):
            depth = indent(line)
            first = next(j for j in range(i, -1, -1) if indent(lines[j]) < depth)
            last = next(j for j in range(i, len(lines)) if indent(lines[j]) < depth)
            if "scf.for" in lines[first]:
                yield lines[first + 1 : last]


def overwritten_operands(code: str) -> list[str]:
    """Operands of GEMMs in a loop's shared memory with fewer buffers than others there."""
    lines = code.splitlines()
    counts = {name: int(count) for name, count in BUFFERS.findall(code)}
    found = []
    for body in loops(lines):
        views = {name: source for name, _kind, source in VIEW.findall("\n".join(body))}
        operands = {}
        for name in (x for pair in DOT.findall("\n".join(body)) for x in pair):
            source = name
            while source in views:
                source = views[source]
            if source in counts:
                operands[name] = counts[source]
        most = max(operands.values(), default=0)
        found += [name for name, count in operands.items() if count < most]
    return found
