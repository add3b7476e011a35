"""What a case is: one input of one operator, shared by the tests and the benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of an operator.

    Attributes:
        name: Unique among the operator's cases; part of the test's name.
        make: Makes the arguments of the public function on a device, from torch's global generator
            (which the caller has seeded).
        mutated: Names of the arguments that the call writes.
        bytes_moved: Bytes that any implementation must read and write.
        flops: Floating-point operations of the operator's matrix products (0 where memory alone
            counts).
        operand_dtype: The dtype that kernels round matrix operands to, where it is coarser than a
            result's; the tolerance rule takes its eps from it.
        perf: A benchmark size, not run by the tests.
    """

    name: str
    make: Callable[[torch.device], dict[str, Any]]
    mutated: tuple[str, ...] = ()
    bytes_moved: int = 0
    flops: int = 0
    operand_dtype: torch.dtype | None = None
    perf: bool = False


def paged_conv_state(
    slots: int, L: int, D: int, layout: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A convolution state as a cache holds it: a view into pages with more bytes than it needs.

    `[slots, L, D]` in layout SD, `[slots, D, L]` in layout DS; the rest of each page is random too.
    """
    pages = torch.randn(slots, L * D + 64, device=device).to(dtype)
    return pages[:, : L * D].unflatten(1, (L, D) if layout == "SD" else (D, L))
