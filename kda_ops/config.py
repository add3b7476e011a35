"""Compile-time configuration, read in traced code.

Each value is a plain attribute of this module, so `torch.compile` guards on it: assign to it and
the next call of a compiled function recompiles once and gives the answer of the new value. Values
are checked where they are used, not where they are set.

Attributes:
    conv_layout: Layout of every short-convolution state whose call does not name one. `"SD"` is
        `(slots, L, D)`, `"DS"` is `(slots, D, L)`. Taken from the environment variable
        `KDA_OPS_CONV_LAYOUT` at import, `"SD"` without it.
    check_values: Also check tensor *values* (offsets, slots, counts) of CUDA tensors. Costs a
        synchronisation per operator, off by default. Values of CPU tensors are always checked.
        Without it every kernel stays memory-safe for any values.
    deterministic_choice: Take kernel choices from the shipped tables alone, never from timing.
        Today every choice comes from a table, so it changes nothing.
"""

import os

LAYOUTS = ("SD", "DS")

conv_layout: str = os.environ.get("KDA_OPS_CONV_LAYOUT", "SD")
check_values: bool = False
deterministic_choice: bool = False


def resolve_layout(layout: str | None) -> str:
    """The layout a call uses: its own argument, else `conv_layout`.

    Raises:
        ValueError: The layout is not one of `LAYOUTS`.
    """
    if layout is None:
        layout = conv_layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout
