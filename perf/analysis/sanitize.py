"""Runs our kernels under NVIDIA's compute-sanitizer: `python -m perf.analysis.sanitize [--tools
memcheck ...]`.

Runs the small cases of every operator, first without a tool, to fill the cache of compiled kernels,
then once under each tool. Every tensor has its own CUDA allocation, so that a read past its end is
detected (but not one past a tile of chunked KDA's workspace). Prints a table for
`perf/notes/sanitizer.md` and keeps the logs; exits 1 if a tool found something.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kda_ops._cases import operator_packages, public_function

TOOLS = ("memcheck", "racecheck")
FINDING = 99  # exit status of the sanitizer if it found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
SEGMENTED = ("chunk_kda", "chunk_kda_gated", "chunk_kda_gated_affine")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer",)


def operators() -> list[str]:
    return sorted(operator_packages())


@contextmanager
def in_segments(count: int) -> Iterator[None]:
    """Makes chunked KDA scan sequences of any length in that many segments."""
    module = importlib.import_module("kda_ops.delta_rule.chunked.kernels.scan")
    with mock.patch.object(module, "segment_count", return_value=count):
        yield


def takes_segments(name: str, inputs: dict[str, Any]) -> bool:
    """Whether an operator would scan such inputs in segments if long and with few heads."""
    if name not in SEGMENTED:
        return False
    from kda_ops.delta_rule.chunked.kernels.scan_segments import has_segments

    return has_segments(inputs["q"].dtype, inputs["q"].shape[-1])


def run_cases(names: Sequence[str], device: torch.device) -> int:
    """Calls each operator once on each of its small cases, chunked KDA also in segments; returns
    the number of calls.
    """
    calls = 0
    for name in names:
        cases = importlib.import_module(f"{operator_packages()[name]}.cases").CASES
        for case in cases:
            if case.perf or case.cpu_only:
                continue
            inputs = case.make(device)
            with torch.no_grad():
                public_function(name)(**inputs)
                calls += 1
                if takes_segments(name, inputs):
                    with in_segments(3):
                        public_function(name)(**inputs)
                    calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def find_sanitizer() -> str:
    """The sanitizer's path.

    Raises:
        FileNotFoundError: It is not installed.
    """
    found = [shutil.which("compute-sanitizer"), *(p for p in PLACES if Path(p).exists())]
    for path in found:
        if path is not None:
            return path
    raise FileNotFoundError("compute-sanitizer is not on the PATH; name it with --sanitizer")


def call(command: Sequence[str], log: Path, seconds: float) -> int:
    """Exit status of a command whose output goes to a file; 124 if it timed out."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as file:
        try:
            return subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def outcome(status: int, text: str) -> str:
    """The result of a tool: its own summary, or how it ended without one."""
    summaries = SUMMARY.findall(text)
    if status in (0, FINDING) and summaries:
        return str(summaries[-1])
    return "ran out of time" if status == 124 else f"no summary, exit status {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.sanitize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tools", nargs="+", default=TOOLS, help="memcheck, racecheck, synccheck")
    parser.add_argument("--operators", nargs="+", default=operators(), metavar="NAME")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitizer"))
    parser.add_argument("--seconds", type=float, default=900, help="time limit per tool")
    parser.add_argument("--run", action="store_true", help="only run the cases, without a tool")
    options = parser.parse_args(arguments)
    if options.run:
        print(f"{run_cases(options.operators, torch.device('cuda'))} calls")
        return 0
    sanitizer = options.sanitizer or find_sanitizer()
    options.logs.mkdir(parents=True, exist_ok=True)
    cases = [
        sys.executable,
        "-m",
        "perf.analysis.sanitize",
        "--run",
        "--operators",
        *options.operators,
    ]
    alone = options.logs / "alone.log"
    status = call(cases, alone, options.seconds)
    if status != 0:
        print(f"the cases do not run alone, exit status {status}: {alone}", file=sys.stderr)
        return 1
    clean = True
    print("| tool | calls | seconds | found |\n| --- | --- | ---: | --- |")
    for tool in options.tools:
        log, start = options.logs / f"{tool}.log", time.monotonic()
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FINDING), *cases]
        status = call(command, log, options.seconds)
        words = outcome(status, log.read_text())
        calls = alone.read_text().splitlines()[-1]
        print(f"| {tool} | {calls} | {time.monotonic() - start:.0f} | {words} |", flush=True)
        clean &= status == 0 and SUMMARY.search(log.read_text()) is not None
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
