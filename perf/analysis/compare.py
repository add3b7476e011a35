"""Compares a run with the last committed ones of the same GPU: `python -m perf.analysis.compare`.

Machines differ, so a row's time is first normalized by what the same run measured on its machine:
the time of a copy, and for compute-bound rows also that of a GEMM. A row is worse if every such
measure says so by more than `LIMIT`; then the exit status is 1. (Baselines are not used: their
autotuning varies more from run to run than our times.) By default the run is the newest uncommitted
file in `perf/history/<gpu>/`.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.analysis.report import newest
from perf.harness.machine import HISTORY, folder_of
from perf.harness.rows import OURS
from perf.harness.runs import read_run

LIMIT = 0.05
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """One of our rows in two runs; `by` is the relative increase of its time, by each measure."""

    key: Key
    before_us: float
    after_us: float
    by: dict[str, float]

    @property
    def worse(self) -> float:
        """How much worse it is by the most favorable measure."""
        return min(self.by.values())

    def __str__(self) -> str:
        measures = ", ".join(f"{100 * x:+.1f} % to {name}" for name, x in self.by.items())
        stage, case, provider = self.key
        times = f"{self.before_us:.4g} to {self.after_us:.4g} us"
        return f"{stage} {case}, {provider}: {times} ({measures})"


def rows_by_key(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Each row from the newest of these runs that has it: a run may be partial."""
    rows = newest(read_run(path) for path in paths)
    return {(row["stage"], row["case"], row["provider"]): row for row in rows}


def changes(before: dict[Key, dict[str, Any]], after: dict[Key, dict[str, Any]]) -> list[Change]:
    """Our rows in both, worst first."""
    found = []
    for key, new in after.items():
        old = before.get(key)
        if old is None or not key[2].startswith(OURS):
            continue
        by = {"the copy": _worse(old, new, "copy_TB_per_s")}
        if _bound_by_products(new):
            by["the GEMM"] = _worse(old, new, "matmul_TFLOP_per_s")
        found.append(Change(key, old["us"], new["us"], by))
    return sorted(found, key=lambda change: -change.worse)


def _worse(old: dict[str, Any], new: dict[str, Any], ceiling: str) -> float:
    """How much longer the row takes, in units of each run's ceiling."""
    return float(new["us"] * new[ceiling] / (old["us"] * old[ceiling]) - 1)


def _bound_by_products(row: dict[str, Any]) -> bool:
    """Whether the row is compute-bound: its roofline is that of its GEMMs."""
    return bool(
        row["TFLOP_per_s"] * row["us"] > 0.99 * row["roofline_us"] * row["matmul_TFLOP_per_s"]
    )


def committed(folder: Path) -> list[Path]:
    """The runs in a folder that are in the repository, as they are on disk."""
    command = ["git", "ls-files", "--", str(folder)]
    names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HISTORY).stdout
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", str(folder)],
        **{"capture_output": True, "text": True, "check": True, "cwd": HISTORY},
    ).stdout
    dirty = {line[3:].rsplit("/", 1)[-1] for line in changed.splitlines()}
    paths = [folder / Path(name).name for name in names.splitlines()]
    return [path for path in paths if path.suffix == ".json" and path.name not in dirty]


def choose_run() -> Path:
    """The newest uncommitted run.

    Raises:
        FileNotFoundError: There is none.
    """
    known = {path for folder in HISTORY.iterdir() for path in committed(folder)}
    new = [path for path in HISTORY.glob("*/*.json") if path not in known]
    if not new:
        raise FileNotFoundError("every run in perf/history is committed: name one, or make perf")
    return max(new, key=lambda path: path.stat().st_mtime)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", nargs="?", type=Path, help="JSON file of the new run")
    parser.add_argument("--against", nargs="+", type=Path, help="JSON files instead of history")
    options = parser.parse_args(arguments)
    try:
        run = options.run or choose_run()
    except FileNotFoundError as error:
        parser.error(str(error))
    after = rows_by_key([run])
    if not after:
        print(f"perf.analysis.compare: no rows in {run}", file=sys.stderr)
        return 1
    gpu = next(iter(after.values()))["gpu"]
    earlier = options.against or committed(folder_of(gpu))
    before = rows_by_key(path for path in earlier if path.resolve() != run.resolve())
    if not before:
        print(f"perf.analysis.compare: no earlier run of {gpu} to compare with")
        return 0
    found = changes(before, after)
    for change in found:
        print(("worse   " if change.worse > LIMIT else "        ") + str(change))
    worse = sum(change.worse > LIMIT for change in found)
    print(f"{worse} of {len(found)} rows are more than {100 * LIMIT:.0f} % worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
