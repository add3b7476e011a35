"""Inputs of conv_split for tests and benchmarks."""

from typing import Any

import torch

from kda_ops._cases import Case, paged_conv_state


def _case(
    name: str,
    slots: int,
    L: int,
    sizes: tuple[int, ...],
    layout: str,
    dtype: torch.dtype = torch.bfloat16,
    perf: bool = False,
) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        state = paged_conv_state(slots, L, sum(sizes), layout, dtype, device)
        return {"conv_state": state, "sizes": sizes, "layout": layout}

    moved = 2 * slots * L * sum(sizes) * dtype.itemsize
    return Case(name=name, make=make, bytes_moved=moved, perf=perf)


CASES = [
    _case("SD-bf16", 5, 3, (64, 64, 64), "SD"),
    _case("DS-bf16", 5, 3, (64, 64, 64), "DS"),
    _case("SD-uneven-fp32", 3, 5, (24, 24, 40), "SD", torch.float32),
    _case("DS-uneven-fp16", 3, 5, (24, 24, 1040), "DS", torch.float16),
    _case("DS-empty-part", 4, 3, (16, 0, 24), "DS"),
    _case("SD-one-part", 4, 3, (40,), "SD"),
    _case("SD-256-slots", 256, 3, (4096, 4096, 4096), "SD", perf=True),
    _case("DS-256-slots", 256, 3, (4096, 4096, 4096), "DS", perf=True),
]
