"""FLA's layer as a baseline of `python -m kda_ops bench`, here run by the operators of this package
since its own kernels need a GPU: what is tested are the weights and states that it is given.
"""

from collections.abc import Iterator

import pytest
import torch

from kda_ops.demos.bench import providers
from kda_ops.demos.bench.command import KimiDeltaAttention, relative_error
from kda_ops.demos.bench.providers import Task
from kda_ops.integrations.fla import patch, unpatch
from tests.support import fla_layers


@pytest.fixture
def patched() -> Iterator[None]:
    assert fla_layers.KimiDeltaAttention  # imports FLA without its warning
    patch()
    yield
    unpatch()


@pytest.mark.parametrize(
    ("kind", "shape"), [("prefill", (2, 70)), ("decode", (1, 3)), ("train", (1, 70))]
)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.usefixtures("patched")
def test_it_computes_the_same(
    kind: str, shape: tuple[int, int], lower_bound: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda layer, device: layer)
    bounded = lower_bound is not None
    layer = KimiDeltaAttention(24, 8, 2, lower_bound=lower_bound, safe_gate=bounded)
    task = Task(kind, layer, torch.randn(*shape, 24))
    call = providers.fla(task)
    assert relative_error(call(), providers.exact(task)) < 1e-5
    if kind == "decode":  # the states go on
        assert relative_error(call(), providers.exact(task)) > 1e-3
