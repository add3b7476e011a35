"""Faster autotuning for baselines: all configurations of a kernel compile in parallel, on every
core, and each is timed for milliseconds.

The fastest configuration is still found by measuring on the row's inputs, as FLA itself would.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

WARM_UP_MS, REPEAT_MS = 5, 25  # Triton's own are 25 and 100


def timed_briefly(call: Any, quantiles: Any) -> Any:
    """Triton's benchmark of one configuration, in a quarter of the time."""
    import triton.testing

    return triton.testing.do_bench(call, warmup=WARM_UP_MS, rep=REPEAT_MS, quantiles=quantiles)


def compile_together(tuner: Any, configs: Any, arguments: dict[str, Any], threads: int) -> None:
    """Compiles a kernel's configurations in parallel, without running them.

    Those that do not compile are left to the autotuner, which drops them.
    """
    import triton

    with (
        ThreadPoolExecutor(threads) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for config in configs:
            tuner.fn.run(**{**arguments, **config.all_kwargs(), "warmup": True})


@contextlib.contextmanager
def quick_tuning(threads: int | None = None) -> Iterator[None]:
    """Context manager: Triton's autotuner compiles on `threads` cores (all if None) and times
    briefly.
    """
    from triton.runtime.autotuner import Autotuner

    workers = threads or len(os.sched_getaffinity(0))
    prune_configs = Autotuner.prune_configs

    def prune_and_compile(tuner: Any, kwargs: dict[str, Any]) -> Any:
        configs = prune_configs(tuner, kwargs)
        if len(configs) > 1:
            compile_together(tuner, configs, {**tuner.nargs, **kwargs}, workers)
        if tuner._do_bench is None:
            tuner._do_bench = timed_briefly
        return configs

    with mock.patch.object(Autotuner, "prune_configs", prune_and_compile):
        yield
