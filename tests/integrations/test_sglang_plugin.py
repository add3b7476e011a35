"""The hook in SGLang's Triton KDA kernel, in a stub of SGLang's plugins, against each prompt alone
in unfused operators.
"""

import enum
import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch
from torch import Tensor

import kda_ops
from kda_ops import chunk_kda, gate_cumsum, l2norm
from kda_ops.integrations import sglang

H, K = 2, 16
KERNEL = "sglang.srt.layers.attention.linear.kernels.kda_triton"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's kernel with the plugin's hook, whose own `extend` returns what it was called with.

    Like SGLang, the registry keeps hooks by their targets and applies them when all plugins are
    loaded: an "around" hook gets the method before its arguments.
    """

    class HookType(enum.Enum):
        AROUND = "around"

    hooks = []

    class HookRegistry:
        @classmethod
        def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
            hooks.append((target, hook, hook_type))

    class TritonKDAKernel:
        def extend(self, *args: Any, **options: Any) -> Any:
            return args, options

    modules = {
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        KERNEL: {"TritonKDAKernel": TritonKDAKernel},
    }
    for path, names in modules.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
        sys.modules[path].__dict__.update(names)
    monkeypatch.setattr("kda_ops._versions.version", lambda name: sglang.READ)
    assert sglang.register()
    ((target, hook, kind),) = hooks
    assert (target, kind) == (f"{KERNEL}.TritonKDAKernel.extend", HookType.AROUND)
    original = TritonKDAKernel.extend
    TritonKDAKernel.extend = lambda *args, **options: hook(original, *args, **options)
    return TritonKDAKernel()


def arguments(lengths: list[int], slots: list[int], rows: int = 0) -> tuple[list, dict[str, Any]]:
    """Views of wide projections, as SGLang passes them, and NaN in rows of nobody."""
    torch.manual_seed(0)
    T = sum(lengths)
    wide = torch.randn(T + rows, 5 * H * K, dtype=torch.float64)
    wide[T:] = float("nan")
    q, k, v, g = (x.unflatten(-1, (H, K))[None] for x in wide.split(H * K, dim=-1)[:4])
    beta = wide[None, :, 4 * H * K : 4 * H * K + H]
    states = torch.randn(8, H, K, K, dtype=torch.float64)
    options = {
        "ssm_states": states,
        "cache_indices": torch.tensor(slots, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(),
        "A_log": torch.randn(1, 1, H, 1, dtype=torch.float64),
        "dt_bias": torch.randn(H * K, dtype=torch.float64),
        "beta_is_raw": True,
        "return_intermediate_states": False,
        "track_state": None,
        "is_spec_decode": False,
        "layer_id": 3,
    }
    return [q, k, v, g, beta], options


@pytest.mark.parametrize("bound", [None, -5.0])
def test_prompts_continue_from_their_slots(kernel: Any, bound: float | None) -> None:
    inputs, options = arguments([70, 1, 9, 0], [3, 5, -1, 0], rows=4)
    options["lower_bound"] = bound
    before = options["ssm_states"].clone()
    out = kernel.extend(*inputs, **options)
    expected, states = torch.zeros_like(inputs[2]), before.clone()
    for slot, part in ((3, slice(0, 70)), (5, slice(70, 71))):
        q, k, v, g, beta = (x[:, part] for x in inputs)
        g_cumsum = gate_cumsum(g, options["A_log"], options["dt_bias"], lower_bound=bound)
        o, final = chunk_kda(
            l2norm(q),
            l2norm(k),
            v,
            g_cumsum,
            beta.sigmoid(),
            initial_state=before[slot][None],
            output_final_state=True,
        )
        expected[:, part] = o
        assert isinstance(final, Tensor)
        states[slot] = final[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(options["ssm_states"], states)


@pytest.mark.parametrize(
    "change",
    [
        {"return_intermediate_states": True},
        {"track_state": torch.zeros(1, H, K, K)},
        {"is_spec_decode": True},
        {"beta_is_raw": False},
        {"A_log": None},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_is_more_than_an_output_stays_sglangs(kernel: Any, change: dict[str, Any]) -> None:
    inputs, options = arguments([5], [3])
    options |= change
    before = options["ssm_states"].clone()
    args, passed = kernel.extend(*inputs, **options)
    assert all(x is y for x, y in zip(args, inputs, strict=True))
    assert passed == options
    assert torch.equal(options["ssm_states"], before)


def test_it_stays_out_of_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> str:
        caplog.clear()
        assert not sglang.register()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        return record.getMessage()

    assert refused().endswith("SGLang is not installed")
    monkeypatch.setattr("kda_ops._versions.version", lambda name: "0.5.230")
    assert refused().endswith("SGLang must be 0.5.23, got 0.5.230")
    monkeypatch.setattr("kda_ops._versions.version", lambda name: "0.5.23.post1")
    assert "this SGLang has another interface: No module named 'sglang'" in refused()


def test_sglang_finds_the_plugin() -> None:
    project = tomllib.loads((Path(kda_ops.__file__).parent.parent / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["sglang.srt.plugins"]
    found = [EntryPoint(n, x, "sglang.srt.plugins").load() for n, x in points.items()]
    assert found == [sglang.register]
