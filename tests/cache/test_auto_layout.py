"""Layout `"auto"`: resolved when a state is allocated, by timing on a GPU (here with a fake timer),
and inferred from the state afterwards.
"""

import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import kda_ops
from kda_ops import config, tuning
from kda_ops.cache import layout_autotune
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.transfer.geometry import state_geometry
from kda_ops.tuning import benchmark
from tests.support.oracle import assert_close

BF16 = torch.bfloat16
SLOTS = 5


class Timer:
    """Pretends that the CPU is a GPU on which one layout is faster; both are really run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
        self.faster = faster
        self.timed = 0
        gpu = lambda device: ("sm_90", "H200")  # noqa: E731
        gpu.cache_clear = lambda: None
        monkeypatch.setattr(benchmark, "gpu", gpu)
        monkeypatch.setattr(benchmark, "time_call", self.time_call)

    def time_call(self, call: Any, device: torch.device) -> float:
        call()
        self.timed += 1
        return 1.0 if self.faster == ("DS", "SD")[self.timed % 2] else 2.0  # SD is timed first


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tuning.clear_cache()
    yield
    tuning.clear_cache()


def auto_spec(**options: Any) -> KDAStateSpec:
    return KDAStateSpec(2, 4, 8, 16, conv_dtype=BF16, layout="auto", **options)


@pytest.mark.parametrize("num_spec", [0, 2])
@pytest.mark.parametrize("faster", ["SD", "DS"])
def test_the_faster_layout_is_allocated(
    faster: str, num_spec: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(monkeypatch, faster)
    spec = auto_spec(num_spec=num_spec)
    assert spec.layout == "auto"
    decided = spec.decide_layout()
    assert decided == dataclasses.replace(spec, layout=faster)
    conv, recurrent = spec.allocate(SLOTS)
    assert conv.shape == (SLOTS, *decided.conv_shape)
    assert recurrent.shape == (SLOTS, 4, 16, 8)
    assert timer.timed == 2
    tuning.clear_cache()  # as in another process
    assert spec.decide_layout().layout == faster
    assert timer.timed == 2
    assert auto_spec(num_spec=1).decide_layout()  # other sizes
    assert timer.timed == 4


def test_shards_and_transferred_states_are_ds(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, "SD")
    assert auto_spec(tp_size=2).layout == "DS"
    assert auto_spec().decide_layout(transfer=True).layout == "DS"
    assert auto_spec().allocate(SLOTS, transfer=True)[0].shape == (SLOTS, 96, 3)
    layer = KimiDeltaAttention(32, 8, 2, conv_layout="auto")
    assert layer.state_spec(transfer=True).layout == "DS"
    assert timer.timed == 0
    assert layer.state_spec().layout == "SD"
    assert timer.timed == 2


def test_the_cpu_and_deterministic_tuning_give_sd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_spec().decide_layout().layout == "SD"
    timer = Timer(monkeypatch, "DS")
    monkeypatch.setattr(config, "deterministic_tuning", True)
    assert auto_spec().decide_layout().layout == "SD"
    assert timer.timed == 0


def test_an_explicit_layout_stays() -> None:
    spec = dataclasses.replace(auto_spec(), layout="SD")
    assert spec.decide_layout(transfer=True) is spec


def test_an_undecided_spec_has_no_offsets() -> None:
    spec = auto_spec()
    assert spec.page_bytes == spec.decide_layout().page_bytes
    assert spec.offset("recurrent") == spec.decide_layout().offset("recurrent")
    for use in (lambda: spec.conv_shape, lambda: spec.offset("k")):
        with pytest.raises(ValueError, match=re.escape("layout must be decided first")):
            use()
    with pytest.raises(ValueError, match="spec must have a layout"):
        state_geometry(spec, pages=4, block_tokens=64)


def test_operators_infer_the_layout_from_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "conv_layout", "auto")
    x, weight, state_indices = torch.randn(2, 12), torch.randn(12, 4), torch.tensor([2, 1])
    state = torch.randn(3, 3, 12)
    turned = state.transpose(1, 2).contiguous()
    expected = kda_ops.short_conv_update(
        x, state.clone(), weight, state_indices=state_indices, layout="SD"
    )
    for conv in (state, turned):
        y = kda_ops.short_conv_update(x, conv, weight, state_indices=state_indices)
        assert torch.equal(y, expected)
    assert torch.equal(state, turned.transpose(1, 2))
    assert [p.shape for p in kda_ops.conv_split(turned, [4, 4, 4])] == [(3, 4, 3)] * 3
    with pytest.raises(ValueError, match="where the shape of the state does not tell"):
        kda_ops.short_conv_update(
            x[:, :3], torch.randn(3, 3, 3), weight[:3], state_indices=state_indices
        )
    with pytest.raises(ValueError, match="where the shape of the state does not tell"):
        kda_ops.state_copy(state, torch.randn(3, 2, 4, 4), torch.zeros(1, 4, dtype=torch.int64))


def step(layer: Any, state: Any) -> torch.Tensor:
    torch.manual_seed(1)
    batch = KDABatch.decode([1, 2, 3])
    with torch.no_grad():
        return layer(torch.randn(1, 3, 32), state=state, batch=batch)


def filled(layer: KimiDeltaAttention, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same states in either layout."""
    torch.manual_seed(2)
    spec = dataclasses.replace(layer.state_spec(), layout=layout)
    conv, recurrent = spec.allocate(SLOTS)
    values = torch.randn(SLOTS, 3, spec.conv_dim)
    conv.copy_(values if layout == "SD" else values.transpose(1, 2))
    recurrent.copy_(torch.randn(recurrent.shape))
    return conv, recurrent


def test_each_layout_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KimiDeltaAttention(32, 8, 2)
    expected = step(layer, filled(layer, "SD"))
    exact = expected.double()
    compiled = torch.compile(layer, fullgraph=True)
    counters.clear()
    graphs = []
    for configured, layout in [
        ("SD", "SD"), ("DS", "DS"), ("auto", "SD"), ("auto", "DS"),
        ("auto", "SD"), ("SD", "SD"), ("DS", "DS"), ("auto", "DS"),
    ]:  # fmt: skip
        monkeypatch.setattr(config, "conv_layout", configured)
        state = filled(layer, layout)
        assert_close(step(compiled, state), expected, exact)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 3, 4, 4, 4, 4, 4]


def test_two_models_of_different_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, one graph each, with states in different layouts."""
    first = KimiDeltaAttention(32, 8, 2, conv_layout="SD")
    second = KimiDeltaAttention(32, 8, 2, conv_layout="DS")
    second.load_state_dict(first.state_dict())
    counters.clear()
    for _ in range(2):
        for layer in (first, second):
            state = filled(layer, layer.conv_layout)
            twin = tuple(x.clone() for x in state)
            expected = step(layer, twin)
            out = step(torch.compile(layer, fullgraph=True), state)
            assert_close(out, expected, expected.double())
            for x, y in zip(state, twin, strict=True):
                assert_close(x, y, y.double())
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("faster", ["SD", "DS"])
def test_a_fresh_state_in_compiled_code(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is made while the layer is traced, and is a constant of the graph."""
    layer = KimiDeltaAttention(32, 8, 2, conv_layout="auto")
    x = torch.randn(1, 70, 32)
    with torch.no_grad():
        expected, (conv, _) = layer(x, output_state=True)
        exact, _ = copy.deepcopy(layer).double()(x.double(), output_state=True)
        timer = Timer(monkeypatch, faster)
        tuning.clear_cache()
        out, (found, _) = torch.compile(layer, fullgraph=True)(x, output_state=True)
    assert timer.timed == 2
    assert found.shape == ((2, 3, 48) if faster == "SD" else (2, 48, 3))
    assert_close(found if faster == "SD" else found.transpose(1, 2), conv, conv.double())
    assert_close(out, expected, exact)


@pytest.mark.parametrize("num_spec", [0, 3])
def test_what_is_timed_runs(num_spec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is never timed."""
    run: list[str] = []

    def call_both(kernel: str, device: Any, *, bench: Any, **key: Any) -> dict[str, str]:
        for layout in ("SD", "DS"):
            bench({"layout": layout})()
            run.append(layout)
        return {"layout": "DS"}

    monkeypatch.setattr(layout_autotune, "choose", call_both)
    monkeypatch.setattr(layout_autotune, "SEQUENCES", 2)
    arguments = (1, 1, 16, 16, 4, num_spec, "torch.bfloat16", "torch.float32", "cpu")
    assert layout_autotune.faster_layout(*arguments) == "DS"
    assert run == ["SD", "DS"]


@pytest.mark.gpu
@pytest.mark.parametrize("num_spec", [0, 3])
def test_both_layouts_are_timed_on_the_gpu(num_spec: int, caplog: pytest.LogCaptureFixture) -> None:
    spec = KDAStateSpec(32, 32, 128, 128, conv_dtype=BF16, layout="auto", num_spec=num_spec)
    with caplog.at_level(logging.INFO, logger="kda_ops.tuning"):
        decided = spec.decide_layout("cuda")
    (line,) = [line for line in caplog.messages if line.startswith("conv_layout(")]
    times = dict(re.findall(r"layout=(SD|DS) ([\d.]+) us", line))
    assert times.keys() == {"SD", "DS"}
    assert float(times[decided.layout]) == min(map(float, times.values()))
    assert spec.allocate(SLOTS, device="cuda")[0].shape == (SLOTS, *decided.conv_shape)
