"""What a choice needs to know about a GPU: its architecture, whether it may be used now, and how
long a call takes on it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

WARM_UPS = 3
REPEATS = 20


@cache
def gpu(device: torch.device) -> tuple[str, str] | None:
    """Architecture (`sm_90`, `gfx942`) and name of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return architecture, torch.cuda.get_device_name(device)


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph: nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call in microseconds, with a cold L2 cache."""
    with torch.cuda.device(device):
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(max(2 * cache_bytes, 1 << 20), dtype=torch.uint8, device=device)
        for _ in range(WARM_UPS):
            call()
        times = []
        for _ in range(REPEATS):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[REPEATS // 2]
