"""Autotuning: one way to choose between kernel variants: block sizes and warps, one kernel or
several, a layout.

A launcher asks `choose("gate", x.device, K=K)` and gets the values of its kernel as a dictionary:

1. on a GPU in the shipped table, its row (`configs.py`);
2. elsewhere the cached result of an earlier timing (`disk_cache.py`);
3. else the fastest of a few candidates, timed now: when a launcher is traced while `torch.compile`
   compiles, or at the first eager call, but never while a stream is captured, and never again for
   the same GPU, key and versions. Candidates are timed on arguments modeled on those of the current
   operator call (`example_inputs.py`).

With `kda_ops.config.deterministic_tuning`, on the CPU, in a captured stream and for an unknown
size, the default of the table is used. Choices are static: one key, one answer, for the life of the
process.

Each choice is one line of the log `kda_ops.tuning`; `TORCH_LOGS="kda_ops.tuning"` prints it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from kda_ops import config
from kda_ops.tuning import benchmark, disk_cache
from kda_ops.tuning.configs import CANDIDATES, DEFAULTS, TABLE, row_for
from kda_ops.tuning.example_inputs import NoHintError, examples

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
# Makes the call to time for a candidate.
Bench = Callable[[dict[str, Any]], Callable[[], Any]]


class Choice(NamedTuple):
    """What was chosen, and why."""

    values: Values
    source: str
    times: Mapping[str, float] = {}
    final: bool = True


# The current operator call: its launcher, its parameters with their roles, the arguments.
_call: ContextVar[tuple[Any, ...] | None] = ContextVar("kda_ops_call", default=None)
_overrides: ContextVar[Mapping[str, Values] | None] = ContextVar("kda_ops_overrides", default=None)
_chosen: dict[Any, Values] = {}
_lock = RLock()


def choose(kernel: str, device: torch.device, *, bench: Bench | None = None, **key: Any) -> Values:
    """The values of a kernel.

    Args:
        kernel: Its name in the table.
        device: Where it runs.
        bench: What to time for a candidate. None means the current operator call.
        key: What the choice depends on: numbers, strings, dtypes. A symbolic number becomes the
            string "dynamic" rather than being specialized.

    Returns:
        The values, read-only.
    """
    overrides = _overrides.get()
    if overrides and kernel in overrides:
        return overrides[kernel]
    known = ["dynamic" if isinstance(x, torch.SymInt) else x for x in key.values()]
    slot = (kernel, device, config.deterministic_tuning, *known)
    values = _chosen.get(slot)
    if values is not None:
        return values
    key = {
        name: x if isinstance(x, (int, str)) else str(x) for name, x in zip(key, known, strict=True)
    }
    # never time within an override, which may be in a thread that the lock waits for
    with _lock if overrides is None else nullcontext():
        if slot in _chosen:
            return _chosen[slot]
        choice = _decide(kernel, device, key, bench)
        if choice.final:
            _chosen[slot] = choice.values
    _explain(kernel, device, key, choice)
    return choice.values


class calling:
    """Context manager: choices without a `bench` are timed by calling the launcher.

    A class, since it is on the path of every eager call: a generator costs a microsecond.
    """

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __enter__(self) -> None:
        self.token = _call.set(self.call)

    def __exit__(self, *error: Any) -> None:
        _call.reset(self.token)


@contextmanager
def override(values: Mapping[str, Values]) -> Iterator[None]:
    """Context manager: the named kernels use these values, and nothing is timed."""
    token = _overrides.set(values)
    try:
        yield
    finally:
        _overrides.reset(token)


def cache_key() -> str:
    """The configuration that affects choices, for the cache keys of compiled code."""
    given = _overrides.get() or {}
    overrides = "".join(f", {name}: {_text(values)}" for name, values in given.items())
    return ("table" if config.deterministic_tuning else "timed") + overrides


def clear_cache() -> None:
    """Clears the choices of this process; those on disk stay."""
    _chosen.clear()
    benchmark.gpu.cache_clear()


def _decide(kernel: str, device: torch.device, key: Values, bench: Bench | None) -> Choice:
    gpu = benchmark.gpu(device)
    if gpu is None:
        return Choice(row_for(DEFAULTS[kernel], key), "default")
    architecture, name = gpu
    if kernel in TABLE.get(architecture, {}):
        return Choice(row_for(TABLE[architecture][kernel], key), f"table of {architecture}")
    default = row_for(DEFAULTS[kernel], key)
    candidates = [dict(default)]
    candidates += [values for values in CANDIDATES.get(kernel, []) if values != default]
    if len(candidates) == 1 or config.deterministic_tuning:
        return Choice(default, "default")
    if _overrides.get() is not None:
        return Choice(default, "default, another kernel is being timed", final=False)
    question = {"kernel": kernel, "gpu": name, "key": dict(key), "candidates": candidates}
    remembered = disk_cache.load(question, candidates)
    if remembered is not None:
        return Choice(remembered, "remembered")
    if benchmark.capturing():
        return Choice(default, "default, the stream is being captured", final=False)
    with _disable_current_modes(), torch.no_grad():
        try:
            times = _measure(kernel, device, candidates, bench or _bench_of_call(kernel, device))
        except NoHintError as error:
            return Choice(default, f"default, {error}", final=False)
        except RuntimeError as error:  # such as no memory for the arguments
            logger.warning("%s on %s cannot be timed: %s", kernel, device, error)
            return Choice(default, "default")
    if not times:
        logger.warning("%s on %s: no candidate ran, the default is taken", kernel, device)
        return Choice(default, "default, no candidate ran")
    fastest = min(times, key=lambda n: times[n])
    named = {_text(candidates[n]): time for n, time in times.items()}
    disk_cache.save(question, candidates[fastest], named)
    return Choice(candidates[fastest], "measured", named)


def _bench_of_call(kernel: str, device: torch.device) -> Bench:
    call = _call.get()
    if call is None:
        raise NoHintError("no operator is being called")
    launcher, parameters, arguments = call
    arguments = examples(parameters, arguments, device)

    def bench(values: dict[str, Any]) -> Callable[[], Any]:
        def run() -> None:
            with override({kernel: values}):
                launcher(*arguments)

        return run

    return bench


def _measure(
    kernel: str, device: torch.device, candidates: list[dict[str, Any]], bench: Bench
) -> dict[int, float]:
    """Microseconds of each candidate that runs, by index."""
    times = {}
    for n, values in enumerate(candidates):
        try:
            times[n] = benchmark.time_call(bench(values), device)
        except Exception as error:  # such as more shared memory than this GPU has
            logger.info("%s: %s does not run: %s", kernel, _text(values), error)
    return times


def _explain(kernel: str, device: torch.device, key: Values, choice: Choice) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    times = ", ".join(f"{values} {time:.1f} us" for values, time in choice.times.items())
    logger.info(
        "%s(%s) on %s: %s (%s)%s",
        kernel,
        _text(key),
        device,
        _text(choice.values),
        choice.source,
        f": {times}" if times else "",
    )


def _text(values: Values) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
