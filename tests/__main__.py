"""Runs every test that needs no GPU: `python -m tests [pytest arguments]`.

Two processes, since Triton decides at import whether its kernels are interpreted: one with kernels
compiled, one with `TRITON_INTERPRET=1`. Fails when either fails; ends with both of pytest's own
summary lines.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

WORKERS = max(2, min(8, os.cpu_count() or 2))
NO_TESTS = 5
PASSES = (("compiled kernels", {}), ("kernels in Triton's interpreter", {"TRITON_INTERPRET": "1"}))


def run_pass(environment: dict[str, str], arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and last line of one pytest run, whose output is passed on as it comes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark"]
    command += ["-n", str(WORKERS), "--dist", "worksteal", *(arguments or ["tests"])]
    # one thread per worker, and no pool of compiler processes beside the workers
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    last = ""
    with subprocess.Popen(
        command,
        env={**os.environ, **threads, **environment},
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
    summary, failed, empty = [], False, 0
    for title, environment in PASSES:
        print(f"\n{title}", flush=True)
        status, last = run_pass(environment, arguments)
        empty += status == NO_TESTS
        failed |= status not in ((0, NO_TESTS) if arguments else (0,))
        summary += [f"{title}:", last]
    print("\n" + "\n".join(summary), flush=True)
    return 1 if failed or empty == len(PASSES) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
