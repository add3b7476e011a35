"""Fair times of several calls: samples in rounds, so that what else the machine does hits all."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLE_S = 0.005  # long for the resolution of a clock
LEAST, MOST = 3, 200  # samples


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median of its samples, and the middle half of them."""

    median: float
    low: float
    high: float
    samples: int


class Timer:
    """The samples of one call, warmed up."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call, self.device = call, device
        self.samples: list[float] = []
        self.spent = 0.0
        self.calls = 1
        once = min(self.sample(), self.sample())
        self.calls = max(1, round(SAMPLE_S / once))
        self.samples, self.spent = [], 0.0

    def sample(self) -> float:
        """Takes one; seconds a call."""
        wait(self.device)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        wait(self.device)
        took = time.perf_counter() - start
        self.spent += took
        self.samples.append(took / self.calls)
        return self.samples[-1]

    def wants(self, seconds: float) -> bool:
        """Whether there is time for another sample."""
        n = len(self.samples)
        return n < LEAST or (n < MOST and self.spent < seconds)

    def times(self) -> Times:
        ms = sorted(1e3 * x for x in self.samples)
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive")
        return Times(statistics.median(ms), low, high, len(ms))


def measure(timers: list[Timer], seconds: float, update: Callable[[float], None]) -> None:
    """Samples all in turn, for so many seconds each; `update` is told the share that is done."""
    while wanting := [timer for timer in timers if timer.wants(seconds)]:
        for timer in wanting:
            timer.sample()
        done = sum(min(timer.spent / seconds, 1.0) for timer in timers) / len(timers)
        update(done)


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
