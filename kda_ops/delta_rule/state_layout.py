"""The two orders of a recurrent state's last axes: VK, `[..., V, K]`, and KV, `[..., K, V]`, as in
FLA and transformers. Kernels take strides, so both are stepped where they lie.
"""

from typing import Any

from torch import Tensor


def v_first(state: Tensor, state_layout: str) -> Tensor:
    """A state as `[..., V, K]`: itself or a view."""
    return state if state_layout == "VK" else state.transpose(-1, -2)


def state_strides(*states: Tensor | None, state_layout: str = "VK") -> list[Any]:
    """The strides of each state for pages, heads, V and K, zeros for None."""
    strides: list[Any] = []
    for state in states:
        page, head, *last = (0,) * 4 if state is None else state.stride()
        strides += [page, head, *(last if state_layout == "VK" else last[::-1])]
    return strides
