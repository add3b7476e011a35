"""Turns runs into tables: `python -m perf.report RUN.json [--readme FILE.md] [--picture FILE.png]`.

Without options it prints the table. `--readme` puts it between that file's markers, `--picture`
draws one bar per way of computing each case, with the floor as a line (needs matplotlib).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf.rows import OURS

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
COLUMNS = ("stage", "case", "who", "us", "floor", "GB/s", "TFLOP/s", "launches", "peer / ours")
Result = dict[str, Any]


def results(run: dict[str, Any]) -> list[Result]:
    """The rows of a pytest-benchmark run, in its order; what is not one of ours is left out."""
    return [b["extra_info"] for b in run["benchmarks"] if "stage" in b.get("extra_info", {})]


def rates(run: dict[str, Any]) -> list[Result]:
    """What benchmarks of the host have counted, in their order."""
    return [b["extra_info"] for b in run["benchmarks"] if "per_second" in b.get("extra_info", {})]


def rate_table(found: Iterable[Result]) -> str:
    """A Markdown table of rates."""
    lines = ["| on the host | case | what | million per second |", "| --- | --- | --- | ---: |"]
    lines += [
        f"| {r['step']} | {r['case']} | {r['what']} | {r['per_second'] * 1e-6:.3g} |" for r in found
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    if value == 0:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Iterable[Result]) -> str:
    """A Markdown table. The last column is how much longer the fastest peer takes than we do."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3)]
    for row in rows:
        ratio = row.get("peer_ratio")
        cells = (
            row["stage"],
            row["case"],
            row["who"],
            _number(row["us"]),
            f"{row['percent_of_floor']:.0f} %",
            _number(row["GB_per_s"]),
            _number(row["TFLOP_per_s"]),
            str(row["launches"]),
            "" if ratio is None else f"{ratio:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_line(rows: Sequence[Result]) -> str:
    """One sentence on what the run was made with."""
    row = rows[0]
    peer = f", FLA {row['fla']}" if row.get("fla") else ""
    return (
        f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, triton {row['triton']}"
        f"{peer}; copy {row['copy_TB_per_s']:.2f} TB/s, bf16 matrix product "
        f"{row['matmul_TFLOP_per_s']:.0f} TFLOP/s in the same run."
    )


def slower_than_peer(rows: Iterable[Result]) -> list[Result]:
    """Rows of ours that a peer beats."""
    return [row for row in rows if row.get("peer_ratio") is not None and row["peer_ratio"] < 1.0]


def write_readme(path: Path, rows: Sequence[Result]) -> None:
    """Replaces what is between the markers of a Markdown file.

    Raises:
        ValueError: The file lacks the markers, or there are no rows.
    """
    text = path.read_text()
    if not rows:
        raise ValueError("the run must hold at least one row, got none")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold {BEGIN} and then {END} once each")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    path.write_text(f"{head}{BEGIN}\n{machine_line(rows)}\n\n{table(rows)}\n{END}{tail}")


def draw(path: Path, rows: Sequence[Result]) -> None:
    """Bars of every stage and case, ours darker than the peers', the floor as a black line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(f"{row['stage']}\n{row['case']}", []).append(row)
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, members) in zip(axes.flat, groups.items(), strict=False):
        colours = ["#1b5e9b" if row["who"].startswith(OURS) else "#c3c9d1" for row in members]
        bars = axis.barh(
            [row["who"] for row in members], [row["us"] for row in members], color=colours
        )
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.axvline(members[0]["floor_us"], color="black", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("us (line: floor)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="JSON files, later ones win")
    parser.add_argument("--readme", type=Path, help="put the table between this file's markers")
    parser.add_argument("--picture", type=Path, help="draw bars into this PNG (needs matplotlib)")
    options = parser.parse_args(arguments)
    runs = [json.loads(path.read_text()) for path in options.runs]
    measured = [row for run in runs for row in results(run)]
    rows = list({(row["stage"], row["case"], row["who"]): row for row in measured}.values())
    counted = list({(r["step"], r["case"]): r for run in runs for r in rates(run)}.values())
    if counted:
        print(f"{rate_table(counted)}\n")
    if not rows and not counted:
        print("perf.report: no rows in " + ", ".join(map(str, options.runs)), file=sys.stderr)
        return 1
    if not rows:
        return 0
    print(f"{machine_line(rows)}\n\n{table(rows)}")
    for row in slower_than_peer(rows):
        peer = f"{row['peer']} ({row['peer_ratio']:.2f})"
        print(f"slower than {peer}: {row['stage']} {row['case']}, {row['who']}")
    if options.readme:
        write_readme(options.readme, rows)
    if options.picture:
        draw(options.picture, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
