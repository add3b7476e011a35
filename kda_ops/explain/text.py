"""The words of an explanation, for its text and its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kda_ops.explain.result import Fired, Layer, NearMiss, Side

CHECKS = {
    "guard": "rejected by the guard",
    "has_external_users": "still needed",
    "creates_cycle": "would create a cycle",
    "replacement": "the replacement cannot be made",
}
UNKNOWN = "unknown"


def text_of(layer: Layer) -> list[str]:
    """The lines of one layer."""
    lines = []
    for fired in layer.fired:
        lines += row("fired", fired_at(fired), fired.source, replaces(fired))
    for miss in layer.near_misses:
        lines += row("nearly fired", fired_at(miss), miss.source, refusal(miss))
        lines += row("", *blame(miss))
    if not layer.fired and not layer.near_misses:
        lines.append("no rewrite fired or nearly fired")
    before, after = layer.before, layer.after
    for name, old, new in (
        ("launches", launched(before), launched(after)),
        ("calls", called(before), called(after)),
    ):
        lines += row(name, f"{old[0]} -> {new[0]}")
        if old == new:
            lines += row("  both", *old[1:])
        else:
            lines += row("  before", *old[1:]) + row("  after", *new[1:])
    return lines + row("intermediates", moved(layer))


def launched(side: Side) -> list[str]:
    """How many kernels are launched, and which."""
    return [UNKNOWN] if side.failed else [str(len(side.launches)), *counted(side.launches)]


def called(side: Side) -> list[str]:
    """How often something else is called, and what."""
    return [UNKNOWN] if side.failed else [str(len(side.calls)), *counted(side.calls)]


def bytes_moved(side: Side) -> str:
    """Bytes of intermediate results."""
    return UNKNOWN if side.failed else size(side.bytes_moved)


def row(name: str, *values: str) -> list[str]:
    """Lines with a name in front of the first; empty values are left out."""
    shown = [value for value in values if value]
    return [f"{name if not i else '':<15}{value}" for i, value in enumerate(shown)]


def fired_at(what: Fired | NearMiss) -> str:
    name = "" if what.node == what.operator else f" ({what.node})"
    return f"{what.rewrite} at {what.operator}{name}"


def replaces(fired: Fired) -> str:
    return f"replaces {', '.join(fired.removed) or 'plain PyTorch'}"


def refusal(miss: NearMiss) -> str:
    return f"{CHECKS[miss.rejected_by]}: {miss.reason}"


def blame(miss: NearMiss) -> tuple[str, ...]:
    """The source of the node that a reason names, if it is not the call itself."""
    if miss.blamed == miss.node or miss.blamed_source in ("", miss.source):
        return ()
    return (f"{miss.blamed} is {miss.blamed_source}",)


def moved(layer: Layer) -> str:
    change = "" if layer.failed else f", {saved(layer.bytes_saved)} through memory"
    return f"{bytes_moved(layer.before)} -> {bytes_moved(layer.after)}{change}"


def counted(names: Iterable[str]) -> list[str]:
    """Names with their counts."""
    counts = Counter(names)
    return [f"{n} x {name}" if n > 1 else name for name, n in counts.items()] or ["none"]


def size(count: int) -> str:
    """Bytes in the largest unit that leaves one digit before the point."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def saved(count: int) -> str:
    return f"{size(-count)} more" if count < 0 else f"{size(count)} less"
