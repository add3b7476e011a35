"""Benchmarks need a CUDA device unless marked `host`; without one they are deselected, and the run
says so. The JSON of a run is on disk after each row, so that a run that is cut off keeps its rows.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.baselines.autotuning import quick_tuning
from perf.harness import machine
from perf.harness.rows import Measurer, Row
from perf.harness.runs import write_run
from perf.harness.timing import CLOCK

NO_DEVICE = "perf: no CUDA device, its benchmarks deselected"
DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [
        item
        for item in items
        if item.path.name.startswith("bench_") and not item.get_closest_marker("host")
    ]
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=ours)
        config.stash[DESELECTED] = len(ours)
        items[:] = [item for item in items if item not in ours]
        return
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # the baselines' own


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if DESELECTED in config.stash:
        terminalreporter.write_line(NO_DEVICE, yellow=True)


@functools.cache
def described(config: pytest.Config) -> dict[str, Any]:
    """Facts about the machine and the commit, asked for once: they take a second."""
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    machine_info = config._benchmarksession.get_machine_info()  # type: ignore[attr-defined]
    return {"machine_info": machine_info, "commit_info": commit}


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The rows so far, in the file that pytest-benchmark writes when the run ends."""
    session = getattr(item.config, "_benchmarksession", None)
    if session is None or not session.json or not session.benchmarks:
        return
    hook, config, rows = item.config.hook, item.config, session.benchmarks
    run = hook.pytest_benchmark_generate_json(
        config=config, benchmarks=rows, include_data=True, **described(config)
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=rows, output_json=run)
    write_run(Path(session.json), run)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info |= machine.software()
    if torch.cuda.is_available():
        machine_info |= machine.gpu()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["params"] = None  # a row contains functions; `extra_info` has everything


@pytest.fixture(scope="session", autouse=True)
def _quickly() -> Iterator[None]:
    """Baselines autotune on every core; garbage collection after each row skips what was imported
    before.
    """
    gc.collect()
    gc.freeze()
    with quick_tuning():
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def measurer() -> Measurer:
    facts = machine.gpu()
    software = machine.software()
    named = {"gpu": facts["gpu"], "driver": facts.get("driver_version")}
    named |= {name: software[name] for name in ("torch", "triton", "fla")}
    return Measurer(torch.device("cuda"), facts["l2_bytes"], named)


@pytest.fixture
def measure(measurer: Measurer, benchmark: Any) -> Callable[[Row], None]:
    """Checks one row, measures it and records the derived figures."""
    return lambda row: measurer(row, benchmark)
