"""Performance targets on an H200; `python -m perf.analysis.targets RUN.json` checks a run.

Every target is checked within one run, our best provider of a case against the fastest baseline:
`ratio` and `share` compare replayed CUDA graphs (of training, calls queued behind a busy GPU),
`wall` eager calls including launches, `kernels` and `kernel_roofline` sums of kernel times. Errors
and memory are our worst against the baseline's best. Exits 1 if a required target is missed or was
not measured; those of training, of models and of FLA's layer count if the run has rows of them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.analysis.pages import table_row
from perf.harness.rows import OURS
from perf.harness.runs import read_run, short_number

Rows = Sequence[dict[str, Any]]
NAMES = ("work", "measure", "required", "stretch", "measured", "")


@dataclass(frozen=True)
class Target:
    """A figure that a run should reach.

    Attributes:
        stage: Stage of the rows.
        case: Case of the rows.
        measure: What is compared, a key of `WORK`.
        required: The required figure, None if there is only a stretch goal.
        stretch: The stretch goal, or None.
        baseline: Words in the baseline's name, if there are several.
        known_us: The baseline's time, for runs without it.
        ours: Words in our provider's name, if only some of them count.
    """

    stage: str
    case: str
    measure: str
    required: float | None
    stretch: float | None = None
    baseline: str = ""
    known_us: float | None = None
    ours: str = ""

    def __str__(self) -> str:
        against = f", {self.ours}" if self.ours else ""
        against += f", against {self.baseline}" if self.baseline else ""
        known = f" ({self.known_us:g} us where it was not run)" if self.known_us else ""
        return f"{self.stage} {self.case}{against}{known}"

    @property
    def at_most(self) -> bool:
        return self.measure in AT_MOST

    def met(self, value: float, bound: float | None) -> bool:
        return bound is None or (value <= bound if self.at_most else value >= bound)

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        if self.stretch is not None and self.met(value, self.stretch):
            return "reached"
        if self.required is None:
            return "not reached"
        return "met" if self.met(value, self.required) else "**missed**"


# Keys of rows of accuracy, and their stages.
ACCURACY = {"accuracy": "accuracy", "gradient_accuracy": "gradient accuracy"}
FIELDS = {"ratio": "us", "wall": "eager_us", "kernels": "kernel_us"}
AT_MOST = ("roofline", "kernel_roofline", "us", "share", "memory")
WORK = {
    "ratio": "baseline / ours",
    "wall": "baseline / ours, eager calls",
    "kernels": "baseline / ours, sums of kernels",
    "roofline": "ours / roofline",
    "kernel_roofline": "ours / roofline, sums of kernels",
    "us": "us",
    "share": "ours / baseline",
    "memory": "peak memory, ours / baseline",
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
    Target("layer", "prefill-T8192-H32", "ratio", 1.5, 1.7, "FLA eager"),
    Target("layer", "prefill-T8192-H32", "wall", 2.2, 2.6, "FLA compiled"),
    *(
        Target("accuracy", f"{gate}{inputs}", "error", 1.0)
        for gate in ("softplus", "bounded")
        for inputs in ("", "-harsh", "-near-identical-keys")
    ),
]
CUDNN_BACKWARD_US = 1296  # cuDNN frontend 1.32, on gates as at initialization
# FLA's small cores wait for the host: what is held against them is the sum of their kernels.
TRAINING = [
    Target("core training", "softplus-T8192-H32", "ratio", 3.0, 3.5, "FLA"),
    Target("core backward", "softplus-T8192-H32", "share", 1.0, 0.85, "cuDNN", CUDNN_BACKWARD_US),
    Target("core training", "softplus-T4096-H16", "kernels", 3.0, 3.6, "FLA"),
    Target("core training", "bounded-T8192-H64", "ratio", 2.8, 3.5, "FLA"),
    Target("core training", "softplus-T8192-H8", "kernels", 2.8, 3.5, "FLA"),
    Target("core training", "softplus-8x1024-H32", "ratio", 2.8, 3.5, "FLA"),
    Target("core training", "softplus-T8192-H32", "memory", 1.0, 0.8, "FLA"),
    # a call through autograd takes the host longer than these kernels the GPU
    Target("short_conv backward", "T8192-H32", "kernel_roofline", 1.4, 1.2),
    Target("rms_norm_gated backward", "T8192-H32", "kernel_roofline", 1.25, 1.1),
    Target("layer training", "T8192-H32", "ratio", 1.95, None, "FLA eager"),
    # its graph breaks are the host's time: 17.6 ms a call, 9.3 where calls are queued ahead (1.99x)
    Target("layer training", "T8192-H32", "wall", 2.4, None, "FLA compiled"),
    Target("layer training", "T8192-H32", "us", None, 4300),
    Target("layer training", "T2048-H32", "wall", 4.0, 6.0, "FLA"),
    Target("layer training", "T8192-H32", "memory", 1.0, 0.8, "FLA"),
    *(
        Target("gradient accuracy", f"{gate}{inputs}", "error", 1.0, baseline="FLA", ours="fused")
        for gate in ("softplus", "bounded")
        for inputs in ("", "-harsh", "-near-identical-keys")
    ),
]
TRANSFORMERS_COMPILED_US = 40_800  # T = 4096, transformers 5.24; it compiles for minutes
# What a caller waits for in a decode step includes the host, which eager code waits for.
MODELS = [
    *(
        Target("model prefill", f"T{n}", "ratio", 2.0, baseline="FLA eager", ours="compiled")
        for n in (4096, 8192)
    ),
    Target(
        "model prefill",
        "T4096",
        "share",
        1 / 5,
        baseline="FLA compiled",
        known_us=TRANSFORMERS_COMPILED_US,
        ours="compiled",
    ),
    *(
        Target("model decode", f"batch{n}", "wall", required, baseline=f"FLA {way}", ours=way)
        for n in (1, 16)
        for way, required in (("compiled", 1.3), ("eager", 1.0))
    ),
]
FLA_LAYER = [
    Target("FLA layer", "T8192-H32", "ratio", 1.5, None, "FLA eager"),
    Target("FLA layer training", "T8192-H32", "ratio", 1.9, None, "FLA eager"),
]
# Parts of a run that may be left out, by what they are called.
OPTIONAL = {"training": TRAINING, "models": MODELS, "FLA's layer": FLA_LAYER}


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run, with accuracy rows as separate stages."""
    rows = [benchmark.get("extra_info", {}) for benchmark in run["benchmarks"]]
    accuracy = [
        {**row, "stage": stage, "case": row[key]}
        for key, stage in ACCURACY.items()
        for row in rows
        if key in row
    ]
    return [*(row for row in rows if "stage" in row), *accuracy]


def rows_for(targets: Sequence[Target], rows: Rows) -> list[dict[str, Any]]:
    """The rows of a run in the stages of some targets."""
    stages = {target.stage for target in targets}
    return [row for row in rows if row["stage"] in stages]


def targets_for(rows: Rows) -> list[Target]:
    """Those that rows are judged by: the optional ones where something of theirs was measured."""
    return TARGETS + [t for part in OPTIONAL.values() if rows_for(part, rows) for t in part]


def value_of(target: Target, rows: Rows) -> float | None:
    """The measured figure of our best provider of the case; None if rows are missing."""
    own_rows = [row for row in rows if (row["stage"], row["case"]) == (target.stage, target.case)]
    sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for row in own_rows:
        is_ours = row["provider"].startswith(OURS)
        words = (target.ours if is_ours else target.baseline).split()
        if all(x in row["provider"] for x in words):
            sides[is_ours].append(row)
    ours, baselines = sides[True], sides[False]
    if target.measure == "memory":  # not known of every row
        ours, baselines = ([r for r in x if "peak_MB" in r] for x in (ours, baselines))
    alone = target.measure.endswith(("roofline", "us")) or target.known_us is not None
    if not ours or (not baselines and not alone):
        return None
    if target.measure == "us":
        return float(min(row["us"] for row in ours))
    if target.measure == "roofline":
        return float(min(row["us"] / row["roofline_us"] for row in ours))
    if target.measure == "kernel_roofline":
        return float(min(_get(row, "kernel_us") / row["roofline_us"] for row in ours))
    if target.measure == "share":
        known = min((row["us"] for row in baselines), default=target.known_us)
        return float(min(row["us"] for row in ours) / known)
    if target.measure == "memory":
        return float(max(r["peak_MB"] for r in ours) / min(r["peak_MB"] for r in baselines))
    if target.measure == "error":
        return min(
            min(row[key] for row in baselines) / max(row[key] for row in ours)
            for key in ours[0]
            if key.startswith("error_")
        )
    in_turn = [row["in_turn"] for row in ours if "in_turn" in row]
    if target.measure == "wall" and in_turn:  # calls of both took turns
        return float(max(in_turn))
    return _ratio(baselines, ours, FIELDS[target.measure])


def _ratio(baselines: Rows, ours: Rows, key: str) -> float:
    return float(min(_get(row, key) for row in baselines) / min(_get(row, key) for row in ours))


def _get(row: dict[str, Any], key: str) -> float:
    """A row's figure; runs from before `kernel_us` only have it per kernel."""
    if key == "kernel_us" and key not in row:
        return float(sum(us for _, us in row["kernels"].values()))
    return float(row[key])


def table(rows: Rows, targets: Sequence[Target] | None = None) -> str:
    """Markdown: a line per target, with the measured value and whether it is met."""
    lines = [table_row(NAMES), "| --- | --- | ---: | ---: | ---: | --- |"]
    for target in targets_for(rows) if targets is None else targets:
        value = value_of(target, rows)
        figures = (target.required, target.stretch, value)
        cells = (
            str(target),
            WORK[target.measure],
            *("" if x is None else short_number(x) for x in figures),
            target.verdict(value),
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def missed(rows: Rows, targets: Sequence[Target] | None = None) -> list[Target]:
    """Required targets that are missed or not measured."""
    judged = [t for t in targets or targets_for(rows) if t.required is not None]
    values = ((target, value_of(target, rows)) for target in judged)
    return [t for t, value in values if value is None or not t.met(value, t.required)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.targets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="JSON file")
    rows = rows_of(read_run(parser.parse_args(arguments).run))
    print(table(rows))
    for name, part in OPTIONAL.items():
        if not rows_for(part, rows):
            print(f"\nNo rows of {name}: its targets are left out.")
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
