"""What flash-linear-attention's functions take and these do not."""

from typing import Any

from kda_ops._numerics import CHUNK

OFFERED = ("cp_context", "return_intermediate_states", "chunk_size")


def check_offered(
    cp_context: Any = None, return_intermediate_states: bool = False, chunk_size: int = CHUNK
) -> None:
    if cp_context is not None:
        raise ValueError("cp_context must be None: sequences are not split over ranks here")
    if return_intermediate_states:
        raise ValueError(
            "return_intermediate_states must be False: states between chunks are not kept here"
        )
    if chunk_size != CHUNK:
        raise ValueError(f"chunk_size must be {CHUNK}, the only one of the kernels here, "
                         f"got {chunk_size}")  # fmt: skip


def check_names(kwargs: dict[str, Any], *allowed: str) -> None:
    """Unlike FLA, which ignores them, refuses arguments that nothing reads."""
    unknown = sorted(kwargs.keys() - {*allowed})
    if unknown:
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}")


def is_v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """The layout of a state, also by the argument's older name."""
    if state_v_first and "transpose_state_layout" in kwargs:
        raise ValueError("state_v_first and transpose_state_layout must not both be given")
    return kwargs.get("transpose_state_layout", state_v_first)
