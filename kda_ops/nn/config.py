"""Checks of a layer's configuration. Every error names the argument, what was expected and what was
passed.
"""

import math

from kda_ops._checks import (
    check_at_least,
    check_head_dim,
    check_lower_bound,
    check_multiple,
    check_not_negative,
    check_number,
)
from kda_ops.config import configured_layout

MODES = ("chunk", "fused_recurrent")


def value_head_dim(head_dim: int, expand_v: float) -> int:
    """V from K and V / K."""
    check_number("expand_v", expand_v)
    width = head_dim * float(expand_v)
    found = round(width) if math.isfinite(width) else 0
    if found < 1 or not math.isclose(width, found, rel_tol=1e-5):
        raise ValueError(
            f"expand_v must make head_dim * expand_v = {head_dim} * expand_v an integer, "
            f"got {expand_v}"
        )
    check_head_dim("head_dim", head_dim)
    check_head_dim("head_dim * expand_v", found)
    return found


def check_heads(hidden_size: int, head_dim: int, num_heads: int, num_v_heads: int) -> None:
    check_at_least("hidden_size", hidden_size, 1)
    check_at_least("head_dim", head_dim, 1)
    check_at_least("num_heads", num_heads, 1)
    check_at_least("num_v_heads", num_v_heads, 1)
    check_multiple("num_v_heads", num_v_heads, "num_heads", num_heads)


def check_options(
    mode: str,
    conv_size: int,
    norm_eps: float,
    safe_gate: bool,
    lower_bound: float | None,
    conv_layout: str | None,
) -> None:
    check_at_least("conv_size", conv_size, 2)
    check_not_negative("norm_eps", norm_eps)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if safe_gate and lower_bound is None:
        raise ValueError("lower_bound must be given with safe_gate, got None")
    check_lower_bound(lower_bound)
    if conv_layout is not None:
        configured_layout(conv_layout)


def gate_rank(name: str, rank: int | str | None, head_v_dim: int) -> int | None:
    """The rank of a gate as a number; None is one full-rank matrix."""
    if rank == "head":
        return head_v_dim
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f'{name} must be a positive number, "head" or None, got {rank!r}')
    return rank
