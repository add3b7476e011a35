"""Other values of a kernel than the shipped ones, timed beside these on the rows of the benchmarks:

    python -m perf.sweep short_conv_backward --row "conv" \
        --values BLOCK_D=64,num_warps=1 --values MAX_STEPS=64

Names that are left out keep their shipped values, those of the last row of the table. Without
`--values` those that autotuning tries elsewhere (`kda_ops.tuning.configs.CANDIDATES`). Each is
checked like a row before it is timed, and the shipped values are timed first and last: a difference
smaller than theirs is noise.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kda_ops.tuning import choose, override
from kda_ops.tuning.configs import CANDIDATES, DEFAULTS
from perf.harness import timing
from perf.harness.machine import gpu
from perf.harness.rows import OURS, Row, calls_of, check, expected_tensors

HERE = Path(__file__).parent
SHIPPED = "shipped"


def number_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def values_of(text: str) -> dict[str, Any]:
    """`"A=1,B=2"` as a dictionary."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and pair[0] for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not like BLOCK=64,num_warps=4")
    return {name: number_or_text(value) for name, value in pairs}


def rows_like(text: str) -> list[Row]:
    """Our eager rows whose names contain a text, from all files of benchmarks that list them."""
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(f"perf.{path.stem}")
        found += [
            row
            for row in getattr(module, "ROWS", ())
            if row.provider == OURS and text.lower() in f"{row.stage} {row.case}".lower()
        ]
    return found


def seconds(row: Row, device: torch.device, l2_bytes: int) -> float:
    """Median GPU seconds of a call."""
    calls = calls_of(row, device, l2_bytes)
    graph, _results = timing.capture(calls)
    return timing.gpu_seconds(graph.replay) / len(calls)


Timing = tuple[str, float | None, str]


def sweep(
    kernel: str, row: Row, candidates: Sequence[Mapping[str, Any]], device: torch.device
) -> Iterator[Timing]:
    """What was tried, its seconds or None, and why not; nothing more once the GPU has failed."""
    shipped = choose(kernel, device)
    expected = expected_tensors(row, device)
    l2_bytes = gpu()["l2_bytes"]
    tried = [
        (", ".join(f"{k}={v}" for k, v in x.items()), {kernel: {**shipped, **x}})
        for x in candidates
    ]
    for name, overrides in [(SHIPPED, {}), *tried, (SHIPPED, {})]:
        with torch.no_grad(), override(overrides):
            try:
                check(row, device, expected)
                yield name, seconds(row, device, l2_bytes), ""
            except torch.AcceleratorError as error:
                yield name, None, f"{error}".splitlines()[0]
                return
            except Exception as error:  # does not compile, does not fit, is wrong
                yield name, None, f"{type(error).__name__}: {error}"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=sorted(DEFAULTS), metavar="KERNEL", help="in the table")
    parser.add_argument("--row", required=True, help="part of the stage and case of a row")
    parser.add_argument("--values", type=values_of, action="append", metavar="A=1,B=2")
    options = parser.parse_args(given)
    candidates = options.values or CANDIDATES.get(options.kernel, [])
    if not candidates:
        parser.error(f"{options.kernel} has no candidates: give --values")
    rows = rows_like(options.row)
    if not rows:
        parser.error(f"no row of ours has {options.row!r} in its name")
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    for row in rows:
        print(f"{row.stage} {row.case}", flush=True)
        first = None
        for name, found, reason in sweep(options.kernel, row, candidates, torch.device("cuda")):
            if found is None:
                print(f"  {'':>9}          {name}   {reason}", flush=True)
                continue
            first = first or found
            print(f"  {found * 1e6:9.2f} us  {found / first:6.3f}  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
