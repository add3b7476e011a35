"""Inputs of the state copy for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._cases import Case


def random_pages(
    lead: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    padding: int,
    device: torch.device,
) -> Tensor:
    """`[*lead, *shape]` random states in random pages, each followed by `padding` elements."""
    elements = torch.Size(shape).numel()
    size = (*lead, elements + padding)
    if dtype.is_floating_point:
        pages = torch.randn(size, device=device).to(dtype)
    else:
        pages = torch.randint(-128, 128, size, device=device).to(dtype)
    return pages[..., :elements].unflatten(-1, shape)


def copy_inputs(
    plan: list[tuple[int, int, int, int]],
    slots: int,
    L: int,
    D: int,
    recurrent: tuple[int, int, int],
    *,
    layout: str,
    layers: int | None = 2,
    dtype: torch.dtype = torch.bfloat16,
    recurrent_dtype: torch.dtype = torch.float32,
    num_spec: int | None = None,
    padding: int = 16,
    plan_dtype: torch.dtype = torch.int32,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `state_copy`; `layers=None` is one layer without its axis."""
    lead = (slots,) if layers is None else (layers, slots)
    shape = (L, D) if layout == "SD" else (D, L)
    inputs: dict[str, Any] = {
        "conv": random_pages(lead, shape, dtype, padding, device),
        "recurrent": random_pages(lead, recurrent, recurrent_dtype, padding, device),
        "plan": torch.tensor(plan, dtype=plan_dtype, device=device).reshape(-1, 4),
        "layout": layout,
    }
    if num_spec is not None:
        inputs["num_spec"] = num_spec
    return inputs


def _case(
    name: str,
    plan: list[tuple[int, int, int, int]],
    slots: int,
    L: int,
    D: int,
    recurrent: tuple[int, int, int],
    perf: bool = False,
    **options: Any,
) -> Case:
    conv_bytes = D * options.get("dtype", torch.bfloat16).itemsize
    recurrent_bytes = (
        torch.Size(recurrent).numel() * options.get("recurrent_dtype", torch.float32).itemsize
    )
    moved = 0
    for conv_src, recurrent_src, dst, bias in plan:
        if conv_src >= 0 and (conv_src != dst or bias):
            moved += 2 * (L - bias) * conv_bytes
        if recurrent_src >= 0 and recurrent_src != dst:
            moved += 2 * recurrent_bytes
    return Case(
        name=name,
        make=lambda device: copy_inputs(plan, slots, L, D, recurrent, device=device, **options),
        mutated=("conv", "recurrent"),
        bytes_moved=moved * (options.get("layers", 2) or 1),
        perf=perf,
    )


# one row each: plain copies, different sources, shifts in place, nothing to do, the null block
MIXED = [
    (1, 1, 2, 0),
    (3, 4, 5, 1),
    (6, 7, 6, 2),
    (8, 8, 8, 3),
    (9, 9, 9, 0),
    (-1, 10, 11, 1),
    (12, -1, 13, 2),
    (-1, -1, -7, 99),
    (14, 14, 0, 1),
]
SIZES = (15, 6, 40, (2, 8, 24))


def requests(count: int, bias: int) -> list[tuple[int, int, int, int]]:
    """Disjoint copies, one per request."""
    return [(2 * r + 1, 2 * r + 1, 2 * r + 2, bias) for r in range(count)]


CASES = [
    *[_case(f"mixed-{layout}", MIXED, *SIZES, layout=layout) for layout in ("SD", "DS")],
    *[
        _case(
            f"bytes-{layout}",
            MIXED,
            *SIZES,
            layout=layout,
            layers=None,
            dtype=torch.int8,
            recurrent_dtype=torch.bfloat16,
            padding=5,
            plan_dtype=torch.int64,
        )
        for layout in ("SD", "DS")
    ],
    _case("fp32-SD", MIXED[:3], *SIZES, layout="SD", dtype=torch.float32, num_spec=3),
    _case("many-blocks-DS", MIXED[:4], 9, 5, 4200, (2, 96, 128), layout="DS", layers=None),
    _case("many-blocks-SD", MIXED[:4], 9, 5, 4200, (2, 96, 128), layout="SD", layers=None),
    _case("one-row-DS", [(1, 2, 3, 0)], 4, 1, 7, (1, 3, 5), layout="DS"),
    _case("empty", [], 4, 3, 8, (1, 4, 4), layout="SD"),
    *[
        _case(
            f"{count}x{layers}-{layout}-bias{bias}",
            requests(count, bias),
            2 * count + 1,
            6,
            12288,
            (32, 128, 128),
            layout=layout,
            layers=layers,
            padding=0,
            perf=True,
        )
        for count, layers in ((1, 4), (64, 20), (256, 20))
        for layout in ("SD", "DS")
        for bias in (0, 2)
    ],
]
