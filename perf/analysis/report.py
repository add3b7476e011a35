"""Turns runs into a report: `python -m perf.analysis.report RUN.json ... [--page FILE]
[--picture PNG] [--training FILE [--training-picture PNG]] [--models FILE] [--fla-layer FILE]`.

Prints the targets, each from the newest run with both our row and a baseline's, and the table of
all rows, each from the newest run that has it. `--page` writes them between that file's markers,
but those of training, of transformers' models and of FLA's layer, which the other options write
between those of other pages; the pictures are stacked bars (need matplotlib).
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf.analysis import targets
from perf.analysis.integrations import integration_part
from perf.analysis.pages import table_row, write_between
from perf.analysis.training import training_part
from perf.harness.rows import OURS
from perf.harness.runs import read_run, short_number

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
# Of the parts that `targets.OPTIONAL` names, beside the page on performance.
PAGES = {
    "training": "training.md",
    "models": "integrations.md",
    "FLA's layer": "integrations-fla.md",
}
COLUMNS = (
    *("stage", "case", "provider", "us", "roofline, us", "of roofline"),
    *("GB/s", "TFLOP/s", "launches", "baseline / ours"),
)
Result = dict[str, Any]


def results(run: dict[str, Any]) -> list[Result]:
    """The rows of a pytest-benchmark run, in its order, without foreign benchmarks."""
    return [b["extra_info"] for b in run["benchmarks"] if "stage" in b.get("extra_info", {})]


def rates(run: dict[str, Any]) -> list[Result]:
    """Rates from the host benchmarks, in their order."""
    return [b["extra_info"] for b in run["benchmarks"] if "per_second" in b.get("extra_info", {})]


def rate_table(found: Iterable[Result]) -> str:
    """A Markdown table of rates."""
    lines = ["| on the host | case | what | million per second |", "| --- | --- | --- | ---: |"]
    lines += [
        f"| {r['step']} | {r['case']} | {r['what']} | {r['per_second'] * 1e-6:.3g} |" for r in found
    ]
    return "\n".join(lines)


def pairs(run: dict[str, Any]) -> list[Result]:
    """What has been measured on a CPU, each beside what it is held against, in their order."""
    return [b["extra_info"] for b in run["benchmarks"] if "against_us" in b.get("extra_info", {})]


def pair_table(found: Sequence[Result]) -> str:
    """Markdown: the machine, and how many times as long or as fast each is as what it is held
    against, with its target.
    """
    first = found[0]
    lines = [
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}.\n",
        "| on a CPU | case | us | against | us | ratio | target | |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for r in found:
        sign = "at most" if r["at_most"] else "at least"
        cells = (
            *(r["work"], r["case"], short_number(r["us"]), r["against"]),
            *(short_number(r["against_us"]), f"{r['ratio']:.2f}", f"{sign} {r['target']:g}"),
            "met" if r["met"] else "**missed**",
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def table(rows: Iterable[Result]) -> str:
    """A Markdown table. The last column is the time of the fastest baseline over ours."""
    lines = [table_row(COLUMNS), "|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3)]
    for row in rows:
        ratio = row.get("baseline_ratio")
        cells = (
            row["stage"],
            row["case"],
            row["provider"],
            short_number(row["us"]),
            short_number(row["roofline_us"]),
            f"{row['percent_of_roofline']:.0f} %",
            short_number(row["GB_per_s"]),
            short_number(row["TFLOP_per_s"]),
            str(row["launches"]),
            "" if ratio is None else f"{ratio:.2f}",
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def machine_line(rows: Sequence[Result]) -> str:
    """One line on the run's GPU, software and ceilings."""
    row = rows[0]
    baseline = f", FLA {row['fla']}" if row.get("fla") else ""
    return (
        f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, triton {row['triton']}"
        f"{baseline}; copy {row['copy_TB_per_s']:.2f} TB/s, bf16 GEMM "
        f"{row['matmul_TFLOP_per_s']:.0f} TFLOP/s in the same run."
    )


def slower_than_baseline(rows: Iterable[Result]) -> list[Result]:
    """Our rows that are slower than a baseline."""
    return [
        row for row in rows if row.get("baseline_ratio") is not None and row["baseline_ratio"] < 1.0
    ]


def slowest(rows: Iterable[Result], count: int = 10) -> list[tuple[Result, float]]:
    """The rows that took longest to measure, with their seconds."""
    timed = [(row, sum(row["host_seconds"].values())) for row in rows if "host_seconds" in row]
    return sorted(timed, key=lambda pair: -pair[1])[:count]


def newest(runs: Iterable[dict[str, Any]]) -> list[Result]:
    """The rows of several runs, each from the newest one that has it."""
    ordered = sorted(runs, key=lambda run: str(run.get("datetime", "")))
    found = [row for run in ordered for row in results(run)]
    return list({(row["stage"], row["case"], row["provider"]): row for row in found}.values())


def measured_together(runs: Iterable[dict[str, Any]]) -> list[Result]:
    """The rows of several runs, with all rows of a case from one run: the newest with both ours and
    a baseline's, or else the newest one. Baselines are compared only within a run.
    """
    cases: dict[Any, list[list[Result]]] = {}
    for run in sorted(runs, key=lambda run: str(run.get("datetime", ""))):
        found: dict[Any, list[Result]] = {}
        for row in targets.rows_of(run):
            found.setdefault((row["stage"], row["case"]), []).append(row)
        for case, rows in found.items():
            cases.setdefault(case, []).append(rows)

    def rank(pair: tuple[int, list[Result]]) -> tuple[bool, int]:
        index, rows = pair
        return len({row["provider"].startswith(OURS) for row in rows}) == 2, index

    return [row for found in cases.values() for row in max(enumerate(found), key=rank)[1]]


def write_page(path: Path, rows: Sequence[Result], goals: str, picture: Path | None = None) -> None:
    """Replaces the text between the markers of a Markdown file by the picture, the table of targets
    (`goals`) and the folded table of all rows.

    Raises:
        ValueError: The file lacks the markers, or there are no rows.
    """
    if not rows:
        raise ValueError("the run must hold at least one row, got none")
    parts = [machine_line(rows)]
    if picture is not None:
        parts.append(linked(picture, path))
    parts += [goals, "<details>\n<summary>All rows</summary>", table(rows), "</details>"]
    write_between(path, BEGIN, "\n\n".join(parts), END)


def linked(picture: Path, page: Path) -> str:
    link = os.path.relpath(picture, page.parent)
    return f"![Time of each stage, ours beside the baseline's]({link})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="JSON files")
    parser.add_argument("--page", type=Path, help="write the report between this file's markers")
    parser.add_argument("--picture", type=Path, help="draw stacked bars into this PNG")
    parser.add_argument("--training", type=Path, help="write training between this file's markers")
    parser.add_argument("--training-picture", type=Path, help="the same bars of training")
    parser.add_argument("--models", type=Path, help="write models between this file's markers")
    parser.add_argument("--fla-layer", type=Path, help="write FLA's layer between this file's")
    options = parser.parse_args(arguments)
    runs = [read_run(path) for path in options.runs]
    rows = newest(runs)
    counted = list({(r["step"], r["case"]): r for run in runs for r in rates(run)}.values())
    paired = list({(r["work"], r["case"]): r for run in runs for r in pairs(run)}.values())
    if counted:
        print(f"{rate_table(counted)}\n")
    if paired:
        print(f"{pair_table(paired)}\n")
    if not rows and not counted and not paired:
        print(
            "perf.analysis.report: no rows in " + ", ".join(map(str, options.runs)), file=sys.stderr
        )
        return 1
    if not rows:
        return 0
    judged = measured_together(runs)
    print(f"{machine_line(rows)}\n\n{table(rows)}\n\n{targets.table(judged)}\n")
    for row in slower_than_baseline(rows):
        baseline = f"{row['baseline']} ({row['baseline_ratio']:.2f})"
        print(f"slower than {baseline}: {row['stage']} {row['case']}, {row['provider']}")
    for row, seconds in slowest(rows):
        print(f"{seconds:6.1f} s to measure {row['stage']} {row['case']}, {row['provider']}")
    parts = {name: targets.rows_for(goals, rows) for name, goals in targets.OPTIONAL.items()}
    trained = parts["training"]
    others = [row for row in rows if not any(row in part for part in parts.values())]
    for path, shown, goals in (
        (options.picture, others, targets.TARGETS),
        (options.training_picture, trained, targets.TRAINING),
    ):
        if path and shown:
            from perf.analysis.picture import draw

            draw(path, shown, goals)
    if options.page:
        goals_table = targets.table(judged, targets.TARGETS)
        links = [f"[{name}]({PAGES[name]})" for name, part in parts.items() if part]
        if links:
            goals_table += f"\n\nOn pages of their own: {', '.join(links)}."
        write_page(options.page, others, goals_table, options.picture)
    if options.training:
        picture = options.training_picture
        head = [machine_line(trained)] if trained else []
        head += [linked(picture, options.training)] if picture else []
        write_between(options.training, BEGIN, training_part(trained, judged, head), END)
    for path, name, heading in (
        (options.models, "models", "### Speed on a GPU"),
        (options.fla_layer, "FLA's layer", "## Speed on a GPU"),
    ):
        if path:
            found = parts[name]
            line = machine_line(found) if found else ""
            goals = targets.OPTIONAL[name]
            write_between(path, BEGIN, integration_part(found, judged, goals, heading, line), END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
