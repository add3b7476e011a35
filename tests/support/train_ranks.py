"""What one process of `tests/package/test_train_ranks.py` runs: the command, several times, in the
environment that torchrun makes. `python -m tests.support.train_ranks PROCESS WORLD FOLDER PORT...`,
with a port for each of `LAUNCHES`. Writes what each printed to `FOLDER/<launch>-<process>.json`.
"""

import contextlib
import functools
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kda_ops.__main__ import main
from kda_ops.demos.training.trainer import Trainer

LOST = "lost"
OPTIONS = ["--device=cpu", "--dtype=fp64", "--lr=3e-3", "--hidden=16", "--layers=2", "--heads=2"]
OPTIONS += ["--batch=4", "--length=72", "--json"]


@dataclass(frozen=True)
class Launch:
    """One run of the command: its name, its processes, its options, whether it compiles."""

    name: str
    processes: range
    options: str
    compiled: bool = False


# in this order; two that share no process run at the same time. Meshes of four ranks differ, as
# PyTorch reuses what it has planned for an equal one, whose process groups are gone
LAUNCHES = (
    Launch("dp", range(2), "--text=text --steps=4 --save=dp"),
    Launch("tp", range(2, 4), "--tp=2 --resume=one --steps=4 --save=tp"),
    Launch("both", range(4), "--tp=2 --dp=2 --fsdp --resume=tp --steps=6 --save=tp"),
    Launch("replicas", range(4), "--cp=2 --resume=dp --steps=5"),
    Launch("context", range(4), "--tp=2 --cp=2 --resume=tp --steps=7 --save=tp"),
    Launch("compiled", range(2, 4), "--tp=2 --resume=one --steps=4", compiled=True),
    Launch("compiled context", range(2), "--cp=2 --fsdp --resume=one --steps=4", compiled=True),
    Launch("other text", range(2), "--text=text --steps=1"),
    Launch(LOST, range(2), "--text=text --steps=4"),
)


def launch(run: Launch, process: int, port: int) -> dict[str, Any]:
    """Runs the command as one of its ranks, as torchrun would."""
    rank = run.processes.index(process)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(len(run.processes)),
        "LOCAL_WORLD_SIZE": str(len(run.processes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    options = run.options.split()
    if run.name == "other text" and rank == 1:
        options[0] = "--text=other"
    if run.compiled:  # up to code generation, which one process has tests for
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    else:
        options.append("--eager")
    if run.name == LOST and rank == 1:
        Trainer.read = lambda self: os._exit(0)  # type: ignore[method-assign]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", *OPTIONS, *options])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    process, world, folder, *ports = sys.argv[1:]
    os.chdir(folder)
    for run, port in zip(LAUNCHES, ports, strict=True):
        if int(process) in run.processes:
            found = launch(run, int(process), int(port))
            Path(f"{run.name}-{process}.json").write_text(json.dumps(found))
    os._exit(0)  # no farewell to ranks that are gone
