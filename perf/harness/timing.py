"""GPU time from events: CUDA-graph replays over rotating inputs, eager calls, kernels by name.

No figure is of a host's clock. Every one is a median of many rounds after a warm-up.
"""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

ROUNDS = 40
WARM_UP_SECONDS = 0.05
SPIN_CYCLES = 200_000  # about 100 us, for the host to get ahead of the GPU
CYCLES_PER_SECOND = 2e9  # of a GPU, at most


class Clock:
    """A clock advanced only by GPU event times: pytest-benchmark's timer."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def queueing_cycles(work: Callable[[], Any]) -> int:
    """For how many cycles the GPU has to spin until the host has queued all of the work."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return max(SPIN_CYCLES, int(1.5 * seconds * CYCLES_PER_SECOND))


def event_seconds(work: Callable[[], Any], cycles: int = SPIN_CYCLES) -> float:
    """GPU seconds of one piece of work.

    The GPU spins first while the host queues the work, so host time is not counted, if it is less.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def gpu_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median GPU seconds of `work`, warmed up."""
    warm_up(work)
    return statistics.median(event_seconds(work) for _ in range(rounds))


def warm_up(work: Callable[[], Any]) -> None:
    """Runs `work` until kernels are compiled and tuned and the GPU's clocks have ramped up."""
    work()
    spent = 0.0
    while spent < WARM_UP_SECONDS:
        spent += max(event_seconds(work), 1e-5)


def eager_seconds(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> float:
    """Median seconds of one eager call on an idle GPU, including launch costs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(rounds):
        torch.cuda.synchronize()
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def times_of_first(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int = ROUNDS
) -> float:
    """How many times as long as the first of two calls the second takes, on an idle GPU with launch
    costs: both take turns, so that a host that is slower for a while is so for both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        warm_up(call)
    for _ in range(rounds):
        for call, found in zip((first, second), times, strict=True):
            found.append(eager_seconds([call], rounds=1))
    return statistics.median(times[1]) / statistics.median(times[0])


def capture(calls: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """One CUDA graph that makes every call once, and their results.

    The results are kept alive, so each call has its own output memory, as it has its own inputs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def rotations(bytes_per_call: int, l2_bytes: int, most: int = 64) -> int:
    """Number of input sets to rotate so that none is still in the L2 cache when reused."""
    return max(2, min(most, -(-3 * l2_bytes // max(bytes_per_call, 1))))


def kernels(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of one call, by kernel name; copies and fills count as launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(
            ("##", "Torch-Compiled")
        )
        if event.device_type == torch.autograd.DeviceType.CUDA and not annotation:
            found[event.name].append(event.time_range.elapsed_us())
    return {name: (len(times), sum(times)) for name, times in found.items()}


def workspace_bytes(call: Callable[[], Any]) -> int:
    """Peak GPU memory of a call besides its arguments and results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated()
    del result
    return torch.cuda.max_memory_allocated() - kept


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialized allocation with NaN, which exposes elements never written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
