"""Runs every test that needs no GPU, or those that need one: `python -m tests [--gpu] [pytest
arguments]`.

Three sequential processes. Triton decides at import whether its kernels are interpreted:
one with kernels compiled, one with `TRITON_INTERPRET=1`, each with a worker per core. Then, where
NIXL is installed, the transfers between processes, which have the machine to themselves. Fails when
any fails; ends with pytest's own summary line of each. The tests on a CUDA device are one pass.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

WORKERS = max(2, min(8, os.cpu_count() or 2))
NO_TESTS = 5
NO_NIXL = "not run: NIXL is not installed (make nixl)"


class Pass(NamedTuple):
    """One run of pytest."""

    title: str
    environment: dict[str, str]
    options: tuple[str, ...]


PARALLEL = ("-n", str(WORKERS), "--dist", "worksteal", "--nixl", "without")
PASSES = (
    Pass("compiled kernels", {}, PARALLEL),
    Pass("kernels in Triton's interpreter", {"TRITON_INTERPRET": "1"}, PARALLEL),
)
GPU = "--gpu"
GPU_PASS = Pass("on the CUDA device", {}, (*PARALLEL, "-m", "gpu"))
NIXL_PASS = Pass("transfers over NIXL", {}, ("--nixl", "only"))


def run_pass(one: Pass, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and last line of one pytest run, whose output is passed on as it comes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", *one.options]
    command += arguments or ["tests"]
    # one thread per process, and no pool of compiler processes beside the workers
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    last = ""
    with subprocess.Popen(
        command,
        env={**os.environ, **threads, **one.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def main(arguments: Sequence[str]) -> int:
    found = importlib.util.find_spec("nixl") is not None
    passes = (*PASSES, NIXL_PASS) if found else PASSES
    if GPU in arguments:
        passes = (GPU_PASS,)
        arguments = [argument for argument in arguments if argument != GPU]
    summary, failed, empty = [], False, 0
    for one in passes:
        print(f"\n{one.title}", flush=True)
        status, last = run_pass(one, arguments)
        empty += status == NO_TESTS
        failed |= status not in ((0, NO_TESTS) if arguments else (0,))
        summary += [f"{one.title}:", last]
    if not found and passes is PASSES:
        summary += [f"{NIXL_PASS.title}:", NO_NIXL]
    print("\n" + "\n".join(summary), flush=True)
    return 1 if failed or empty == len(passes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
