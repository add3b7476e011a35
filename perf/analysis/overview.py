"""The picture at the top of the README: `python -m perf.analysis.overview RUN.json --svg FILE`.

One row per way of running the layer. Every kernel is a box as wide as its time, so that launches
and time are visible at once; time without a kernel is left blank.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from perf.analysis.report import results
from perf.harness.runs import read_run

CASE = ("layer", "prefill-T8192-H32")
ROWS = (
    ("FLA 0.6.0, compiled", "FLA, torch.compile", "14 graphs, 13 breaks"),
    ("FLA 0.6.0, eager", "FLA, eager", "no graph"),
    ("kda_ops, compiled", "kda-ops, torch.compile", "one graph"),
)
KINDS = (  # pattern of the kernel's name, label, color
    (r"nvjet|gemm|cutlass", "projections (GEMM)", "#9aa5b1"),
    (r"conv", "convolution", "#4c9be8"),
    (r"rms_norm|layer_norm|l2norm", "norms", "#2ca58d"),
    (r"gate_chunk|gate_cumsum|beta", "gate, beta", "#f4a261"),
    (r"chunk|recompute_w_u|scan", "delta rule", "#7b5ea7"),
    (r"", "fills, copies", "#d5dae0"),
)
WIDTH, LEFT, RIGHT, TOP, BAR, STEP = 960, 196, 96, 76, 40, 74
FONT = "ui-sans-serif, system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
Row = dict[str, Any]


def kind_of(kernel: str) -> int:
    """The first of `KINDS` whose pattern matches the kernel's name."""
    return next(i for i, (pattern, _, _) in enumerate(KINDS) if re.search(pattern, kernel))


def boxes(row: Row) -> list[tuple[int, str, float]]:
    """Kind, name and microseconds of each launch, grouped by kind."""
    found = [
        (kind_of(name), name, us / count)
        for name, (count, us) in row["kernels"].items()
        if "Memset" not in name
        for _ in range(int(count))
    ]
    return sorted(found, key=lambda box: box[0])


def bar(row: Row, y: int, scale: float) -> list[str]:
    """The kernels of a row, and the time without a kernel."""
    parts, x = [], float(LEFT)
    for kind, name, us in boxes(row):
        width = us * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(width - 1, 0.6):.1f}" height="{BAR}" rx="2" '
            f'fill="{KINDS[kind][2]}"><title>{escape(name[:80])}: {us:.0f} us</title></rect>'
        )
        x += width
    end = LEFT + row["us"] * scale
    if end - x > 8:
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y + 0.5}" width="{end - x - 1:.1f}" height="{BAR - 1}" '
            'rx="2" fill="none" stroke="#9aa5b1" stroke-dasharray="3 3"/>'
            f'<text x="{(x + end) / 2:.0f}" y="{y + BAR / 2 + 4:.0f}" class="dim" '
            'text-anchor="middle">waiting for the host</text>'
        )
    return parts


def overview(rows: Sequence[Row]) -> str:
    """The picture as SVG.

    Raises:
        ValueError: A row of the picture was not measured.
    """
    found = {row["provider"]: row for row in rows if (row["stage"], row["case"]) == CASE}
    missing = [provider for provider, _, _ in ROWS if provider not in found]
    if missing:
        raise ValueError(f"the run must hold {', '.join(missing)} of {' '.join(CASE)}")
    longest = max(found[provider]["us"] for provider, _, _ in ROWS)
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + STEP * len(ROWS) + 40
    gpu = found[ROWS[0][0]]["gpu"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Kernels and time of one KDA layer" font-family="{FONT}">',
        "<style>text{fill:#1f2933;font-size:13px}.head{font-size:16px;font-weight:600}"
        ".label{font-weight:600}.dim{fill:#616e7c;font-size:12px}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        '<text x="20" y="32" class="head">One KDA layer, 8192 tokens, 32 heads of 128, bf16, '
        f"{escape(gpu)}</text>",
        '<text x="20" y="53" class="dim">Every box is a kernel, as wide as the time it takes.'
        "</text>",
    ]
    for i, (provider, title, note) in enumerate(ROWS):
        row, y = found[provider], TOP + STEP * i
        launches = len(boxes(row))
        parts += [
            f'<text x="20" y="{y + 17}" class="label">{escape(title)}</text>',
            f'<text x="20" y="{y + 35}" class="dim">{escape(note)}</text>',
            *bar(row, y, scale),
            f'<text x="{LEFT + row["us"] * scale + 10:.0f}" y="{y + 17}" class="label">'
            f"{row['us'] / 1000:.2f} ms</text>",
            f'<text x="{LEFT + row["us"] * scale + 10:.0f}" y="{y + 35}" class="dim">'
            f"{launches} launches</text>",
        ]
    x = 20
    for _, name, color in KINDS:
        parts.append(
            f'<rect x="{x}" y="{height - 31}" width="12" height="12" rx="2" fill="{color}"/>'
            f'<text x="{x + 18}" y="{height - 21}" class="dim">{escape(name)}</text>'
        )
        x += 38 + round(7.2 * len(name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.overview", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="JSON file of a run")
    parser.add_argument("--svg", type=Path, required=True, help="output file")
    options = parser.parse_args(arguments)
    try:
        picture = overview(results(read_run(options.run)))
    except ValueError as error:
        print(f"perf.analysis.overview: {error}", file=sys.stderr)
        return 1
    options.svg.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
