"""Two trainings of the same model beside one another: `python -m perf.analysis.curve RUN.json
[--page FILE] [--picture FILE]`, of a run of

    python -m kda_ops train --device cuda --steps 300 --baseline fla --json RUN.json

Prints losses, speed and memory; `--picture` draws the losses (needs matplotlib), and `--page`
writes all of it between that file's markers.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kda_ops.demos.training.curve import write_picture
from perf.analysis.pages import table_row, write_between

BEGIN, END = "<!-- train:begin -->", "<!-- train:end -->"
OURS = "kda-ops"
PARTS = 3  # of a run, at whose ends losses are shown
NEAR = 10  # steps that such a loss is the mean of
Run = dict[str, Any]


def trainings(run: Run) -> dict[str, Run]:
    """Losses, speed and memory of each training, ours first."""
    theirs = run["baseline"]
    return {OURS: run, **({} if theirs is None else {theirs["name"]: theirs})}


def stops(steps: int) -> list[int]:
    """The steps whose losses are shown: the first ones, and those at the end of each part."""
    return sorted({min(NEAR, steps), *(round(steps * i / PARTS) or 1 for i in range(1, PARTS + 1))})


def loss_at(losses: Sequence[float], step: int) -> float:
    """The mean of the losses of the last `NEAR` steps up to this one."""
    near = losses[max(0, step - NEAR) : step]
    return sum(near) / len(near)


def table(run: Run) -> str:
    """Markdown: a row for each training."""
    found = trainings(run)
    # one that was interrupted has fewer
    shown = stops(min(len(training["losses"]) for training in found.values()))
    names = ["", *(f"loss, step {step}" for step in shown), "tokens/s", "peak, MB"]
    lines = [table_row(names), "| --- |" + " ---: |" * (len(names) - 1)]
    for name, training in found.items():
        speed, peak = training["tokens_per_second"], training["peak_bytes"]
        cells = [
            name,
            *(f"{loss_at(training['losses'], step):.3f}" for step in shown),
            "" if speed is None else f"{speed:,.0f}",
            "" if peak is None else f"{peak * 1e-6:,.0f}",
        ]
        lines.append(table_row(cells))
    return "\n".join(lines)


def headline(run: Run) -> str:
    """What was trained, and where."""
    heads, size = run["heads"], run["hidden"] // run["heads"]
    where = f"{run['device_name']}, torch {run['torch']}"
    if run["triton"] is not None:
        where += f", triton {run['triton']}"
    return (
        f"{run['layers']} block{'s' * (run['layers'] > 1)} of hidden {run['hidden']}, "
        f"{heads} heads of {size}, "
        f"{run['dtype']}, {run['batch']} x {run['length']} bytes a step of {run['text']}; {where}. "
        f"A loss is the mean of {NEAR} steps, in nats per byte; tokens/s leaves out the first step."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.curve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="JSON file of python -m kda_ops train")
    parser.add_argument("--page", type=Path, help="write between this file's markers")
    parser.add_argument("--picture", type=Path, help="draw the losses into this file")
    options = parser.parse_args(arguments)
    run = json.loads(options.run.read_text())
    found = trainings(run)
    if not all(training["losses"] for training in found.values()):
        print(f"perf.analysis.curve: no losses in {options.run}", file=sys.stderr)
        return 1
    parts = [headline(run), table(run)]
    if options.picture:
        write_picture({name: x["losses"] for name, x in found.items()}, options.picture)
    print("\n\n".join(parts))
    if options.page:
        if options.picture:
            link = os.path.relpath(options.picture, options.page.parent)
            parts.append(f"![Loss by step of {' and '.join(found)}]({link})")
        heading = "## A run" if run["baseline"] is None else f"## A run beside {list(found)[-1]}"
        text = "\n\n".join([heading, *parts])
        write_between(options.page, BEGIN, text, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
