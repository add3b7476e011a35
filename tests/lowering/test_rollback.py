"""A state that a compiled graph copies, steps and puts back is put back, as in eager code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops

N, H, K, V = 3, 2, 16, 16
SNAPSHOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "copy": lambda state: torch.empty_like(state).copy_(state),
}


def inputs() -> dict[str, Any]:
    q, k, v = (torch.randn(1, N, H, K) * K**-0.5 for _ in range(3))
    tables = {"state_indices": torch.tensor([2, 1, 4]), "cu": torch.arange(N + 1)}
    gates = {"g": -torch.rand(1, N, H, K), "beta": torch.rand(1, N, H)}
    return {"q": q, "k": k, "v": v, **gates, "state": torch.randn(5, H, V, K), **tables}


def step(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, state_indices: Any, cu: Any
) -> Tensor:
    return kda_ops.recurrent_kda(q, k, v, g, beta, state, state_indices, cu_seqlens=cu)


def compare(function: Callable[..., Any]) -> None:
    eager, compiled = inputs(), {}
    compiled = {name: x.clone() for name, x in eager.items()}
    expected = function(**eager)
    found = torch.compile(function, fullgraph=True)(**compiled)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled["state"], eager["state"])


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_a_step_that_is_rolled_back(snapshot: str) -> None:
    def speculate(state: Tensor, **rest: Tensor) -> Tensor:
        before = SNAPSHOTS[snapshot](state)
        o = step(state=state, **rest)
        state.copy_(before)
        return o

    compare(speculate)


def test_a_state_and_its_copy_stepped_apart() -> None:
    def speculate(state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        draft = state.clone()
        first = step(state=state, **rest)
        second = step(state=draft, **rest | {"v": 2 * rest["v"]})
        return first, second, draft

    compare(speculate)


def test_a_page_that_is_rolled_back() -> None:
    def speculate(state: Tensor, **rest: Tensor) -> Tensor:
        before = state.clone()
        o = step(state=state, **rest)
        state[1] = before[1]
        return o

    compare(speculate)
