"""The loss curve: as text, and as a picture where matplotlib is installed."""

import importlib
import math
from pathlib import Path

WIDTH, HEIGHT = 60, 12
MARKS = "*o"
SUFFIXES = (".png", ".svg", ".pdf")


def averages(losses: list[float], count: int) -> list[float]:
    """`count` averages over equal parts, in order; losses are repeated where there are fewer."""
    n = len(losses)
    parts = [
        losses[i * n // count : max(i * n // count + 1, (i + 1) * n // count)] for i in range(count)
    ]
    return [sum(part) / len(part) for part in parts]


def draw(curves: dict[str, list[float]]) -> str:
    """One curve, or two with a legend, over the numbers of the steps."""
    lines = {name: averages(losses, WIDTH) for name, losses in curves.items() if losses}
    finite = [y for line in lines.values() for y in line if math.isfinite(y)]
    if not finite:
        return ""
    top, bottom = max(finite), min(finite)
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, line in zip(MARKS, lines.values(), strict=False):
        before = None
        for x, y in enumerate(line):
            if not math.isfinite(y):
                before = None
                continue
            row = round((top - y) / (top - bottom or 1.0) * (HEIGHT - 1))
            # what lies between two columns is filled, so that a steep line has no gaps
            start = row if before is None else before + (row > before) - (row < before)
            for i in range(min(start, row), max(start, row) + 1):
                canvas[i][x] = mark
            before = row
    labels = {0: top, HEIGHT // 2: None, HEIGHT - 1: bottom}
    labels[HEIGHT // 2] = top - (top - bottom) * (HEIGHT // 2) / (HEIGHT - 1)
    text = ["loss, nats per byte"]
    for i, row_of_marks in enumerate(canvas):
        label = f"{labels[i]:8.3f}" if i in labels else " " * 8
        text.append(f"{label} |{''.join(row_of_marks)}".rstrip())
    steps = max(len(losses) for losses in curves.values())
    text.append(" " * 9 + "+" + "-" * WIDTH)
    text.append(" " * 10 + f"1{f'step {steps}':>{WIDTH - 1}}")
    if len(lines) > 1:
        legend = (f"{mark} {name}" for mark, name in zip(MARKS, lines, strict=False))
        text.append(" " * 10 + "   ".join(legend))
    return "\n".join(text)


def write_picture(curves: dict[str, list[float]], path: Path) -> None:
    """Writes the curves to a file of one of `SUFFIXES`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
