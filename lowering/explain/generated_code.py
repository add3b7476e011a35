"""What a generated module launches and calls, read off its source."""

import re
from dataclasses import dataclass

LAUNCH = re.compile(r"^\s+((?:triton|cpp|\w+_kernel)\w*)(?:\.run)?\(")
CALL = re.compile(r"((?:extern_kernels|torch\.ops|aten)\.[\w.]+)\(")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or one call of something that is none.

    Attributes:
        line: Its line in the generated source, from 1.
        name: The kernel, without its trailing number, or what is called.
        is_kernel: Whether it is a generated or hand-written kernel, and not a call of a GEMM or of
            an operator that fell back.
    """

    line: int
    name: str
    is_kernel: bool


@dataclass(frozen=True)
class Summary:
    """What one generated module does.

    Attributes:
        launches: Names of the launched kernels, in order, without their trailing number.
        externs: Calls that are no generated or hand-written kernel (GEMMs, operators that fell
            back).
        allocations: Number of buffers allocated.
    """

    launches: list[str]
    externs: list[str]
    allocations: int

    def __str__(self) -> str:
        lines = [*self.launches, *(f"extern {name}" for name in self.externs)]
        return "\n".join([*lines, f"{self.allocations} allocations"])


def body(source: str) -> tuple[str, int]:
    """The body of a generated module's `call`, and its first line's number."""
    start = source.index("def call(")
    text = source[start:]
    ends = [end for end in (text.find("\ndef "), text.find("\nrunner =")) if end >= 0]
    return text[: min(ends)] if ends else text, source.count("\n", 0, start) + 1


def launches(source: str) -> list[Launch]:
    """Every launch and every call that a generated module makes, in order."""
    text, first = body(source)
    found = []
    for line, code in enumerate(text.split("\n"), first):
        if kernel := LAUNCH.match(code):
            found.append(Launch(line, re.sub(r"_\d+$", "", kernel[1]), True))
        else:
            found += [Launch(line, name, False) for name in CALL.findall(code)]
    return found


def summary(source: str) -> Summary:
    """Reads launches, extern calls and allocations off a generated module."""
    found = launches(source)
    return Summary(
        [launch.name for launch in found if launch.is_kernel],
        [launch.name for launch in found if not launch.is_kernel],
        len(re.findall(r" = empty_strided_\w+\(", body(source)[0])),
    )
