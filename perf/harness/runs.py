"""Writes the JSON of a run, and reads it, including old ones with former names of fields; formats
numbers.
"""

import json
import os
from pathlib import Path
from typing import Any

OLD_NAMES = {
    "who": "provider",
    "peer": "baseline",
    "floor_us": "roofline_us",
    "percent_of_floor": "percent_of_roofline",
}
OLD_PREFIX, PREFIX = "peer_", "baseline_"


def write_run(path: Path, run: dict[str, Any]) -> None:
    """Writes a run of pytest-benchmark, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(run, default=str))
    os.replace(unfinished, path)


def read_run(path: Path) -> dict[str, Any]:
    """A run of pytest-benchmark, with current field names."""
    run = json.loads(path.read_text())
    for benchmark in run["benchmarks"]:
        if "extra_info" in benchmark:
            benchmark["extra_info"] = _renamed(benchmark["extra_info"])
    return run


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {_name(key): value for key, value in row.items()}


def _name(key: str) -> str:
    if key.startswith(OLD_PREFIX):
        return PREFIX + key.removeprefix(OLD_PREFIX)
    return OLD_NAMES.get(key, key)


def short_number(value: float) -> str:
    if value == 0:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
