"""Scenarios that several processes run together, all of them in the same processes, once."""

import datetime
import json
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import kda_ops

ROOT = Path(kda_ops.__file__).parent.parent


def free_ports(count: int) -> list[str]:
    """Ports for processes that start later: not of those that Linux gives to connections meanwhile,
    such as gloo's.
    """
    found: list[str] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                found.append(str(port))
        except OSError:
            continue
    return found


def start(module: str, world: int, store: Path, *arguments: str) -> list[subprocess.Popen]:
    """The processes of `python -m MODULE RANK WORLD STORE ARGUMENTS`."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world), str(store), *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def failures_of(module: str, world: int, store: Path, timeout_s: float = 300) -> dict[str, str]:
    """Failures of a module's scenarios, with the ranks that had them."""
    found: dict[str, str] = {}
    ranks = start(module, world, store)
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, f"rank {rank} failed"
            for name, why in json.loads(output.splitlines()[-1]).items():
                found[name] = f"{found.get(name, '')}rank {rank}: {why}"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return found


def connect(rank: int, world: int, store: str, timeout_s: float = 60) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout
    )


def run_scenarios(
    scenarios: dict[str, Callable[[Any], None]], rank: int, world: int, store: str
) -> None:
    """One rank: prints the scenarios that failed and why, as JSON."""
    connect(rank, world, store)
    mesh = init_device_mesh("cpu", (world,))
    failures = {}
    only = os.environ.get("SCENARIO")
    for name, run in scenarios.items():
        if only and only != name:
            continue
        torch.manual_seed(0)
        try:
            run(mesh)
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))
    dist.destroy_process_group()
