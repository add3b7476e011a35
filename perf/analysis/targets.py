"""Performance targets on an H200; `python -m perf.analysis.targets RUN.json` checks a run.

Every target is checked within one run, our best provider of a case against the fastest baseline:
`ratio` compares replayed CUDA graphs, `wall` eager calls including launches, `kernels` sums of
kernel times. Errors are our worst against the baseline's. Exits 1 if a required target is missed or
was not measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.harness.rows import OURS
from perf.harness.runs import read_run

Rows = Sequence[dict[str, Any]]
NAMES = ("work", "measure", "required", "stretch", "measured", "")


@dataclass(frozen=True)
class Target:
    """A figure that a run should reach.

    Attributes:
        stage: Stage of the rows.
        case: Case of the rows.
        measure: What is compared: `ratio`, `wall` or `kernels` (at least), `roofline` or `us` (at
            most), or `error` (the baseline's over ours, at least).
        required: The required figure.
        stretch: The stretch goal, or None.
        baseline: Suffix of the baseline's name, if there are several.
    """

    stage: str
    case: str
    measure: str
    required: float
    stretch: float | None = None
    baseline: str = ""

    def __str__(self) -> str:
        return f"{self.stage} {self.case}" + (
            f", against FLA {self.baseline}" if self.baseline else ""
        )

    @property
    def at_most(self) -> bool:
        return self.measure in ("roofline", "us")

    def met(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


FIELDS = {"ratio": "us", "wall": "eager_us", "kernels": "kernel_us"}
WORK = {
    "ratio": "baseline / ours",
    "wall": "baseline / ours, eager calls",
    "kernels": "baseline / ours, sums of kernels",
    "roofline": "ours / roofline",
    "us": "us",
    "error": "error, baseline / ours",
}
TARGETS = [
    Target("core", "softplus-T8192-H32", "ratio", 2.0, 2.6),
    Target("core", "bounded-T8192-H32", "ratio", 2.0, 2.6),
    Target("core", "bounded-T8192-H64", "ratio", 1.95, 2.5),
    Target("core", "bounded-T8192-H96", "ratio", 1.9, 2.4),
    Target("core", "softplus-T8192-H8", "ratio", 2.5, 4.0),
    Target("core", "softplus-T1024-H32", "wall", 8.0),
    Target("core", "softplus-T1024-H32", "kernels", 2.0),
    Target("core", "softplus-8x1024-H32", "ratio", 2.0, 2.4),
    Target("core", "softplus-6ragged-T8192-H32", "ratio", 2.0, 2.4),
    Target("short_conv_qkv", "T8192-H32", "roofline", 1.35, 1.15),
    Target("gate_cumsum", "softplus-T8192-H32", "roofline", 1.2, 1.1),
    Target("rms_norm_gated", "T8192-H32", "roofline", 1.15, 1.05),
    Target("kda_decode", "SD-batch1-H32", "us", 6, 4),
    Target("kda_decode", "SD-batch16-H32", "us", 20, 18),
    Target("kda_decode", "SD-batch64-H32", "us", 74, 68),
    Target("kda_decode", "SD-batch256-H32", "us", 285, 270),
    Target("state_copy", "256x20-SD-bias2", "roofline", 1.25),
    Target("state_copy", "256x20-DS-bias2", "roofline", 1.25),
    Target("layer", "prefill-T8192-H32", "ratio", 1.5, 1.7, "eager"),
    Target("layer", "prefill-T8192-H32", "wall", 2.2, 2.6, "compiled"),
    *(
        Target("accuracy", f"{gate}{inputs}", "error", 1.0)
        for gate in ("softplus", "bounded")
        for inputs in ("", "-harsh", "-near-identical-keys")
    ),
]


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run, with accuracy rows as a separate stage."""
    rows = [benchmark.get("extra_info", {}) for benchmark in run["benchmarks"]]
    accuracy = [
        {**row, "stage": "accuracy", "case": row["accuracy"]} for row in rows if "accuracy" in row
    ]
    return [*(row for row in rows if "stage" in row), *accuracy]


def value_of(target: Target, rows: Rows) -> float | None:
    """The measured figure of our best provider of the case; None if rows are missing."""
    own_rows = [row for row in rows if (row["stage"], row["case"]) == (target.stage, target.case)]
    ours = [row for row in own_rows if row["provider"].startswith(OURS)]
    baselines = [r for r in own_rows if r not in ours and r["provider"].endswith(target.baseline)]
    if not ours or (not baselines and not target.at_most):
        return None
    if target.measure == "us":
        return float(min(row["us"] for row in ours))
    if target.measure == "roofline":
        return float(min(row["us"] / row["roofline_us"] for row in ours))
    if target.measure == "error":
        return min(
            min(row[key] for row in baselines) / max(row[key] for row in ours)
            for key in ("error_o", "error_S")
        )
    return _ratio(baselines, ours, FIELDS[target.measure])


def _ratio(baselines: Rows, ours: Rows, key: str) -> float:
    return float(min(_get(row, key) for row in baselines) / min(_get(row, key) for row in ours))


def _get(row: dict[str, Any], key: str) -> float:
    """A row's figure; runs from before `kernel_us` only have it per kernel."""
    if key == "kernel_us" and key not in row:
        return float(sum(us for _, us in row["kernels"].values()))
    return float(row[key])


def _number(x: float) -> str:
    return f"{x:.3g}"


def table(rows: Rows, targets: Sequence[Target] = TARGETS) -> str:
    """Markdown: a line per target, with the measured value and whether it is met."""
    lines = ["| " + " | ".join(NAMES) + " |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for target in targets:
        value = value_of(target, rows)
        if value is None:
            measured, verdict = "", "not measured"
        else:
            measured = _number(value)
            verdict = "met" if target.met(value, target.required) else "**missed**"
            if target.stretch is not None and target.met(value, target.stretch):
                verdict = "reached"
        stretch = "" if target.stretch is None else _number(target.stretch)
        cells = (
            str(target),
            WORK[target.measure],
            _number(target.required),
            stretch,
            measured,
            verdict,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def missed(rows: Rows, targets: Sequence[Target] = TARGETS) -> list[Target]:
    """Targets that are missed or not measured."""
    values = ((target, value_of(target, rows)) for target in targets)
    return [t for t, value in values if value is None or not t.met(value, t.required)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.targets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="JSON file")
    rows = rows_of(read_run(parser.parse_args(arguments).run))
    print(table(rows))
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
