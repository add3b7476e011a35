"""A case: one input of one operator, shared by the tests and the benchmarks."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


def operator_packages() -> dict[str, str]:
    """Maps operator names to packages, such as `gate` to `kda_ops.gating.gate`."""
    root = Path(__file__).parent
    folders = [path.parent for path in sorted(root.glob("*/*/cases.py"))]
    return {x.name: ".".join((root.name, *x.relative_to(root).parts)) for x in folders}


def public_function(name: str) -> Callable[..., Any]:
    """An operator's public function by its name."""
    found: Callable[..., Any] = getattr(importlib.import_module(operator_packages()[name]), name)
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of an operator.

    Attributes:
        name: Unique among the operator's cases; part of the test's name.
        make: Makes the public function's arguments on a device, from torch's global generator
            (which the caller has seeded).
        mutated: Names of the arguments that the call writes.
        bytes_moved: Bytes that any implementation must read and write.
        flops: Floating-point operations of the operator's GEMMs (0 where only memory traffic
            counts).
        operand_dtype: The dtype that kernels round matrix operands to, where it is coarser than a
            result's; the tolerance rule takes its eps from it.
        cpu_only: Not for kernels: fp64.
        perf: A benchmark size, not run by the tests.
    """

    name: str
    make: Callable[[torch.device], dict[str, Any]]
    mutated: tuple[str, ...] = ()
    bytes_moved: int = 0
    flops: int = 0
    operand_dtype: torch.dtype | None = None
    cpu_only: bool = False
    perf: bool = False


def paged_conv_state(
    slots: int, L: int, D: int, layout: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A convolution state as in a cache: a view into pages larger than the state.

    `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS; the rest of each page is random too.
    """
    pages = torch.randn(slots, L * D + 64, device=device).to(dtype)
    return pages[:, : L * D].unflatten(1, (L, D) if layout == "SD" else (D, L))


def named(cases: list[Case], *names: str) -> list[Case]:
    """The cases of these names."""
    by_name = {case.name: case for case in cases}
    return [by_name[name] for name in names]


def dense(case: Case) -> Case:
    """A case without `state_indices`: sequence n is on page n; pages that are not read are NaN."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = case.make(device)
        sequences = len(inputs.pop("state_indices"))
        if "state" in inputs and "has_initial_state" in inputs:
            pages = inputs["state"].nan_to_num_(0.5)
            pages[:sequences][~inputs["has_initial_state"]] = torch.nan
        return inputs

    return replace(case, name=f"{case.name}-dense", make=make)


def k_first(case: Case) -> Case:
    """A case with its recurrent states `[..., K, V]`, in pages with gaps."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = case.make(device)
        for name in ("state", "initial_state"):
            if name in inputs:
                state = inputs[name].transpose(-1, -2)
                gaps = state.new_full((len(state), state[0].numel() + 8), torch.nan)
                inputs[name] = gaps[:, :-8].unflatten(1, state.shape[1:]).copy_(state)
        return {**inputs, "state_layout": "KV"}

    return replace(case, name=f"{case.name}-KV", make=make)


def negative(case: Case) -> Case:
    """A case with negative slots for its null ones: the last page, and far before the first."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = case.make(device)
        slots = inputs["state_indices"]
        below = -1 - 99 * (torch.arange(slots.numel(), device=device) % 2).view(slots.shape)
        return {**inputs, "state_indices": torch.where(slots == 0, below.to(slots.dtype), slots)}

    return replace(case, name=f"{case.name}-negative", make=make)


def unpacked(inputs: dict[str, Any], widths: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments of a packed convolution with x, weight, bias and conv_state split into q, k and v,
    as in a model that does not pack them: each state in its own pages.
    """
    x = inputs["x"].split(widths, dim=-1)
    if inputs["x"].is_contiguous():
        x = tuple(part.contiguous() for part in x)
    parts = {"x": x, "weight": tuple(w.clone() for w in inputs["weight"].split(widths))}
    if inputs.get("bias") is not None:
        parts["bias"] = tuple(b.clone() for b in inputs["bias"].split(widths))
    if "conv_state" in inputs:
        state, layout = inputs["conv_state"], inputs["layout"]
        slots, L = state.shape[0], state.shape[1 if layout == "SD" else 2]
        states = state.split(widths, dim=2 if layout == "SD" else 1)
        parts["conv_state"] = tuple(
            paged_conv_state(slots, L, width, layout, state.dtype, state.device).copy_(part)
            for part, width in zip(states, widths, strict=True)
        )
    return inputs | parts


def with_states(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Adds random initial states and asks for the final ones."""
    N = len(inputs["cu_seqlens"]) - 1 if "cu_seqlens" in inputs else len(inputs["q"])
    (HV, V), K = inputs["v"].shape[2:], inputs["q"].shape[3]
    initial = torch.randn(N, HV, V, K, device=inputs["q"].device).to(dtype)
    return {**inputs, "initial_state": initial, "output_final_state": True}


def with_pages(
    inputs: dict[str, Any],
    slots: list[int],
    fresh: list[int],
    dtype: torch.dtype = torch.float32,
    more: int = 2,
) -> dict[str, Any]:
    """Adds paged states with padded pages, `more` than the last slot; the null block and the pages
    of `fresh` sequences are NaN.
    """
    (HV, V), K = inputs["v"].shape[2:], inputs["q"].shape[3]
    device = inputs["q"].device
    pages = torch.randn(max(slots) + more, HV * V * K + 32, device=device).to(dtype)
    pages[0] = torch.nan
    for n in fresh:
        pages[slots[n]] = torch.nan
    return {
        **inputs,
        "state": pages[:, 16 : 16 + HV * V * K].unflatten(1, (HV, V, K)),
        "state_indices": torch.tensor(slots, dtype=torch.int32, device=device),
        "has_initial_state": torch.tensor(
            [n not in fresh for n in range(len(slots))], device=device
        ),
    }


# An empty sequence, two in which a block of 128 tokens ends after 64, of one of them at its end and
# on its own page, and a null one.
BLOCKED_OFFSETS = [0, 0, 66, 130, 194]
BLOCKED_SLOTS, BLOCKED_FRESH = [2, 3, 1, 0], [0]
BLOCKED_PAGES = 10


def with_blocks(inputs: dict[str, Any], index_dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    """Adds the block table of a batch of these sequences, whose states have that many pages; the
    page of a block that does not end in the call is none.
    """
    device = inputs["cu_seqlens"].device
    table = [[5, 6], [7, 99], [99, 1], [8, 9]]
    return {
        **inputs,
        "block_table": torch.tensor(table, dtype=index_dtype, device=device),
        "context_lens": torch.tensor([0, 64, 192, 64], dtype=index_dtype, device=device),
        "block_tokens": 128,
    }


def with_dense_blocks(inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds a table of blocks of 64 tokens to two sequences of 130 tokens on pages of up to 8; null
    entries among them.
    """
    device = inputs["state_indices"].device
    return {
        **inputs,
        "block_table": torch.tensor([[3, 4, 5], [-1, 6, 99]], device=device),
        "block_tokens": 64,
    }
