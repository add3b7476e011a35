"""Compile-time configuration, read in traced code.

Each value is a plain attribute of this module. `torch.compile` guards on `impl`, `conv_layout` and
`check_values`: assign one, and the next call of a compiled function recompiles once with the new
value. Values are checked when used, not when set.

Attributes:
    impl: The implementation of every public operator. `"auto"` is the fastest available:
        hand-written kernels on a GPU, rewrites and lowerings in compiled code. `"reference"` is the
        definition in eager PyTorch, on any device, as one opaque call in compiled code that no
        rewrite touches; it takes fp64 on a GPU too, is slow there and always checks tensor values.
        See `reference`.
    conv_layout: Layout of a short-convolution state where the call does not name one. `"SD"` is
        `(slots, L, D)`, `"DS"` is `(slots, D, L)`. `"auto"` is resolved when a state is allocated
        (see `KDAStateSpec.decide_layout`); calls then infer it from the shape of the state. Read
        from the environment variable `KDA_OPS_CONV_LAYOUT` at import, else `"SD"`.
    check_values: Also check tensor *values* (offsets, slots, counts) of CUDA tensors. Costs a
        synchronization per operator; off by default. Values of CPU tensors are always checked.
        Without it every kernel is still memory-safe for any values.
    deterministic_tuning: Take kernel choices and the layout `"auto"` only from the shipped table
        (`kda_ops.tuning`), never from timing. Applies to later eager calls and compilations, which
        have separate caches; code that is already compiled is unchanged.
    saved_bytes: How much a call of chunked KDA on a GPU may save for its gradient besides its
        inputs and its output: 118 KB for 64 tokens of a head in bf16, K = V = 128. Where it takes
        more (by the sizes with which a graph with dynamic ones is compiled), and with 0, the
        gradient computes the states again, which takes a fifth longer. 1 GB by default. Applies to
        later eager calls and compilations.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IMPLS = ("auto", "reference")
LAYOUTS = ("SD", "DS")
AUTO = "auto"

impl: str = "auto"
conv_layout: str = os.environ.get("KDA_OPS_CONV_LAYOUT", "SD")
check_values: bool = False
deterministic_tuning: bool = False
saved_bytes: int = 1_000_000_000


def check_impl() -> None:
    """Raises `ValueError` for a value of `impl` that is not one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"kda_ops.config.impl must be one of {', '.join(IMPLS)}, got {impl!r}")


@contextmanager
def reference() -> Iterator[None]:
    """Context manager: runs every operator as its definition in eager PyTorch, on any device, by
    setting and restoring `impl`.

    Process-wide, like all configuration. The gradient is that of the implementation that ran
    forward, whenever it is computed. Direct calls of `torch.ops.kda_ops` are not affected.
    """
    global impl
    before, impl = impl, "reference"
    try:
        yield
    finally:
        impl = before


def configured_layout(layout: str | None) -> str:
    """The requested layout, possibly `"auto"`: the argument, else `conv_layout`.

    Raises:
        ValueError: The layout is neither `"auto"` nor one of `LAYOUTS`.
    """
    if layout is None:
        layout = conv_layout
    if layout != AUTO and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, {AUTO}, got {layout!r}")
    return layout


def resolve_layout(
    layout: str | None, conv_state: "Tensor | None" = None, channels: int | None = None
) -> str:
    """The layout a call uses: its own argument, else `conv_layout`.

    `"auto"` is inferred from the state: the axis of size `channels` is D. A state without such an
    axis counts as SD (its shape is checked later), and so does a call without a state.

    Args:
        layout: The call's argument.
        conv_state: `[..., L, D]` or `[..., D, L]`.
        channels: D, or None where the call does not know it.

    Raises:
        ValueError: The layout is not allowed, or is `"auto"` for an ambiguous state: D is not
            known, or equal to L.
    """
    layout = configured_layout(layout)
    if layout != AUTO:
        return layout
    if conv_state is None or conv_state.dim() < 2:
        return LAYOUTS[0]
    if channels is None or conv_state.shape[-1] == conv_state.shape[-2]:
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)} where the shape of the state does not "
            f"tell (take the layout of its spec), got {AUTO!r}"
        )
    return "DS" if conv_state.shape[-2] == channels else "SD"
