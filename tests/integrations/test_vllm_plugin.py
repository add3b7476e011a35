"""vLLM's Kimi KDA layer on our operators, in a stub of vLLM, against our layer on whole sequences
without states.
"""

import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib
import torch
from torch import Tensor

import kda_ops
from kda_ops import KimiDeltaAttention
from kda_ops.integrations.vllm import batch_of_metadata, register
from kda_ops.integrations.vllm.plugin import KDALayer
from tests.support import vllm_stub
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close
from tests.support.vllm_stub import Request, describe, forward_context

HIDDEN, HEADS, DIM, SPEC = 32, 2, 16, 2
NAME = "model.layers.0.self_attn"


class Server:
    """A swapped layer, and what each request has put into it so far."""

    def __init__(
        self,
        vllm: Any,
        layout: str,
        *,
        num_spec: int = 0,
        bound: float | None = None,
        dtype: torch.dtype = torch.float64,
        kernels: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.reference = KimiDeltaAttention(
            HIDDEN, DIM, HEADS, lower_bound=bound, output_gate_bias=False, dtype=dtype
        )
        if dtype == torch.float64:
            self.reference.double()
        self.reference.o_norm_weight.data.uniform_(0.5, 1.5)
        config = SimpleNamespace(
            hidden_size=HIDDEN, head_dim=DIM, num_heads=HEADS, conv_size=4, gate_lower_bound=bound
        )
        cache = SimpleNamespace(use_kda_recoverssm=False)
        options = SimpleNamespace(num_spec=num_spec, cache_config=cache, dtype=dtype)
        self.layer = vllm.KimiGatedDeltaNetAttention(config, options, NAME)
        loaded = vllm_stub.load_weights(self.layer, checkpoint(self.reference))
        assert loaded == set(dict(self.layer.named_parameters()))
        self.cache = vllm_stub.allocate(self.layer, 12, layout, dtype)
        self.call = run_kernels(self.layer) if kernels else self.layer
        self.histories: dict[int, Tensor] = {}

    def step(self, *requests: Request, graph: tuple[int, int] = (0, 0), rows: int = 0) -> None:
        """Runs a step on random rows and holds it to whole sequences; `rows` more are padding."""
        count = sum(r.tokens for r in requests)
        weight = self.reference.o_proj.weight
        hidden = torch.randn(count + graph[1] + rows, HIDDEN).to(weight.dtype)
        hidden[count:] = float("nan")
        described = describe(requests, *graph)
        with torch.inference_mode(), forward_context({NAME: described}):
            out = self.call(hidden_states=hidden, positions=torch.arange(len(hidden)))
        assert torch.equal(out[count:], torch.zeros_like(out[count:]))
        for request, x, y in zip(
            requests,
            hidden[:count].split([r.tokens for r in requests]),
            out[:count].split([r.tokens for r in requests]),
            strict=True,
        ):
            past = self.histories.get(request.blocks[0], x[:0])[: request.computed]
            assert len(past) == request.computed
            whole = torch.cat([past, x])
            self.histories[request.blocks[0]] = whole
            with torch.no_grad():
                expected = self.reference(whole[None])[0, request.computed :]
            if weight.dtype == torch.float64:
                torch.testing.assert_close(y, expected)
            else:
                with torch.no_grad():
                    exact = double(self.reference)(whole[None].double())[0, request.computed :]
                assert_close(y, expected, exact)

    def untouched(self, *blocks: int) -> bool:
        return all(x[list(blocks)].isnan().all() for x in self.cache)


def checkpoint(layer: KimiDeltaAttention) -> dict[str, Tensor]:
    """The layer's weights in Moonshot's names."""
    parts = layer.in_parts()
    convs = layer.conv_weight[:, None].chunk(3)
    named = {f"{x}_proj.weight": parts[x] for x in "qkvb"}
    named |= {f"{x}_conv1d.weight": conv for x, conv in zip("qkv", convs, strict=True)}
    return named | {
        "f_a_proj.weight": parts["f"],
        "g_a_proj.weight": parts["g"],
        "f_b_proj.weight": layer.f_proj.weight,
        "g_b_proj.weight": layer.g_proj.weight,
        "A_log": layer.A_log.view(1, 1, -1, 1),
        "dt_bias": layer.dt_bias,
        "o_norm.weight": layer.o_norm_weight,
        "o_proj.weight": layer.o_proj.weight,
    }


def double(layer: KimiDeltaAttention) -> KimiDeltaAttention:
    copy = KimiDeltaAttention(
        HIDDEN, DIM, HEADS, lower_bound=layer.lower_bound, output_gate_bias=False
    ).double()
    copy.load_state_dict(layer.state_dict())
    return copy


@pytest.fixture(params=["SD", "DS"])
def vllm(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    stub = vllm_stub.install(monkeypatch, request.param)
    assert register()
    stub.layout = request.param
    return stub


@pytest.mark.parametrize("bound", [None, -5.0])
def test_steps_without_speculation(vllm: Any, bound: float | None) -> None:
    """Prompts, a prompt in two chunks, decodes, both at once, and one token as a whole prompt."""
    server = Server(vllm, vllm.layout, bound=bound)
    assert isinstance(server.layer, KDALayer)
    server.step(Request([3], 0, 70), Request([5], 0, 5))
    server.step(Request([3], 70, 1), Request([5], 5, 40), Request([2], 0, 9), Request([7], 0, 1))
    server.step(*(Request([b], n, 1) for b, n in ((3, 71), (5, 45), (2, 9), (7, 1))))
    assert server.untouched(0, 1, 4, 6, 8)
    assert len(vllm_stub.breaks) == 3


def test_speculative_steps(vllm: Any) -> None:
    """Alone, beside prompts, and beside requests of one token, in any order."""
    server = Server(vllm, vllm.layout, num_spec=SPEC)
    a, b, c = [3, 4, 5], [6, 7, 8], [9, 10, 11]
    server.step(Request(a, 0, 12), Request(b, 0, 66))
    server.step(Request(a, 12, 3, accepted=1), Request(b, 66, 3, accepted=1))
    # 2 and 3 tokens were accepted, and the second has fewer drafts now
    server.step(Request(a, 14, 3, accepted=2), Request(b, 69, 2, accepted=3))
    server.step(Request(c, 0, 7), Request(a, 15, 3, accepted=1), Request(b, 70, 3, accepted=1))
    server.step(Request(a, 18, 3, accepted=3), Request(c, 7, 1), Request(b, 71, 1, accepted=1))
    server.step(Request(c, 8, 1), Request([1, 0, 0], 0, 4))
    assert server.untouched(0, 2)


def test_padding_of_cuda_graphs(vllm: Any) -> None:
    """Requests on the null block, rows that belong to nobody, and rows past the metadata's."""
    server = Server(vllm, vllm.layout, num_spec=SPEC)
    a, b = [3, 4, 5], [6, 7, 8]
    server.step(Request(a, 0, 5), Request(b, 0, 2), rows=3)
    server.step(Request(a, 5, 1), Request(b, 2, 1), graph=(2, 2))
    server.step(Request(a, 6, 3, accepted=1), Request(b, 3, 2, accepted=1), graph=(1, 4), rows=1)
    server.step(Request(a, 7, 1), Request(b, 4, 9), graph=(2, 0), rows=2)
    server.step(Request(a, 8, 3, accepted=1), Request(b, 13, 1), graph=(2, 0), rows=2)
    assert server.untouched(0, 1, 2, 9, 10, 11)


def test_a_16_bit_model(vllm: Any) -> None:
    """Taps, rates and biases are fp32 in vLLM, as is the recurrent state."""
    server = Server(vllm, vllm.layout, dtype=torch.bfloat16)
    assert [x.dtype for x in server.cache] == [torch.bfloat16, torch.float32]
    server.step(Request([3], 0, 70))
    server.step(Request([3], 70, 1), Request([2], 0, 9))


@pytest.mark.interpreter
def test_the_kernels_take_what_vllm_passes(vllm: Any) -> None:
    """Views of wide projections, tables and pages, in all kinds of steps."""
    server = Server(vllm, vllm.layout, num_spec=SPEC, dtype=torch.bfloat16, kernels=True)
    a, b = [3, 4, 5], [6, 7, 8]
    server.step(Request(a, 0, 9), rows=2)
    server.step(Request(a, 9, 3, accepted=1), graph=(1, 4))
    server.step(Request(b, 0, 2), Request(a, 11, 2, accepted=2))
    server.step(Request(a, 12, 1), Request(b, 2, 3), graph=(1, 0))
    assert server.untouched(0, 1, 2, 9, 10, 11)


def test_runs_without_metadata(vllm: Any) -> None:
    """When vLLM measures memory, and for layers that a dummy run leaves out."""
    server = Server(vllm, vllm.layout)
    for metadata_of_step in (None, {}, {NAME: describe([Request([0], 0, 0)])}):
        with torch.inference_mode(), forward_context(metadata_of_step):
            out = server.layer(torch.full((4, HIDDEN), float("nan")).double(), torch.arange(4))
        assert torch.equal(out, torch.zeros_like(out))
    assert server.untouched(*range(12))


PROMPT = ["short_conv_qkv", "chunk_kda_gated", "rms_norm_gated"]


@pytest.mark.parametrize(
    ("requests", "operators"),
    [
        ([Request([3], 5, 1)], ["kda_decode"]),
        ([Request([3], 0, 9)], PROMPT),
        ([Request([3], 5, 1), Request([4], 0, 9)], ["kda_decode", *PROMPT]),
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_a_step_is_few_operators_in_one_graph(
    monkeypatch: pytest.MonkeyPatch, requests: list[Request], operators: list[str]
) -> None:
    """No model of vLLM 0.33 compiles this layer; if one did, nothing would break its graph."""
    stub = vllm_stub.install(monkeypatch)
    assert register()
    layer = Server(stub, "SD", dtype=torch.float32).layer
    for state in layer.kv_cache:
        state.normal_()
    found = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        found.append([x.split(".")[1] for x in names if x.startswith("kda_ops.")])
        return graph.forward

    described = describe(requests)
    hidden = torch.randn(described.num_actual_tokens, HIDDEN)
    positions = torch.arange(len(hidden))
    states = [x.clone() for x in layer.kv_cache]
    with torch.no_grad(), forward_context({NAME: described}):
        expected = layer(hidden, positions)
        after = [x.clone() for x in layer.kv_cache]
        for x, y in zip(layer.kv_cache, states, strict=True):
            x.copy_(y)
        out = torch.compile(layer, backend=record, fullgraph=True)(hidden, positions)
    assert found == [operators]
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(layer.kv_cache, after, strict=True))


def test_a_batch_is_made_once_per_step() -> None:
    described = describe([Request([3], 5, 1), Request([4], 0, 6)])
    batch, order = batch_of_metadata(described)
    assert order is None
    assert (batch.num_decodes, batch.num_prefills, batch.kind) == (1, 1, "mixed")
    assert batch_of_metadata(described)[0] is batch


def test_what_a_cuda_graph_captures_is_refilled() -> None:
    """Batches of decodes hold views of vLLM's buffers."""
    plain = describe([Request([3], 5, 1), Request([4], 9, 1)], 1, 1)
    speculative = describe([Request([3, 4], 5, 2, accepted=1)], 1, 2)
    for described, names in (
        (plain, {"non_spec_query_start_loc": "cu_seqlens",
                 "non_spec_state_indices_tensor": "state_indices"}),
        (speculative, {"spec_query_start_loc": "cu_seqlens",
                       "spec_state_indices_tensor": "state_indices",
                       "num_accepted_tokens": "num_accepted"}),
    ):  # fmt: skip
        batch, _ = batch_of_metadata(described)
        for theirs, ours in names.items():
            pointers = {getattr(x, y).data_ptr() for x, y in ((described, theirs), (batch, ours))}
            assert len(pointers) == 1, theirs


def test_parameters_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = vllm_stub.install(monkeypatch)
    stock = Server(stub, "SD").layer
    assert register()
    swapped = Server(stub, "SD").layer
    assert not isinstance(stock, KDALayer)
    assert isinstance(swapped, KDALayer)
    assert isinstance(swapped, stub.KimiGatedDeltaNetAttention)
    assert list(swapped.state_dict()) == list(stock.state_dict())
    assert register()  # vLLM may load plugins more than once
    assert len(stub.op_registry_oot) == 1


def test_it_stays_out_of_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> str:
        caplog.clear()
        assert not register()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        return record.getMessage()

    assert refused().endswith("vLLM is not installed")

    stub = vllm_stub.install(monkeypatch, version="0.34.0")
    assert refused().endswith("vLLM must be 0.33, got 0.34.0")
    stub.KimiGatedDeltaNetAttention._forward = lambda self, qkv, out: None
    assert not register(any_version=True)
    assert "its _forward must have the parameters ['self', 'mixed_qkv'" in caplog.text

    stub = vllm_stub.install(monkeypatch)
    stub.op_registry_oot["KimiGatedDeltaNetAttention"] = dict
    assert refused().endswith("dict has replaced it")

    stub = vllm_stub.install(monkeypatch)
    monkeypatch.delattr(sys.modules["vllm.forward_context"], "get_forward_context")
    assert "this vLLM has another interface: module 'vllm.forward_context'" in refused()
    assert stub.op_registry_oot == {}

    def broken(name: str) -> None:
        raise OSError(f"{name} needs a library")

    monkeypatch.setattr("kda_ops.integrations.vllm.plugin.importlib.import_module", broken)
    assert refused().endswith("vllm.model_executor.custom_op needs a library")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_spec": 8}, "num_speculative_tokens must be at most 7, got 8"),
        ({"head_dim": 257}, "head_dim must be at most 256, got 257"),
        ({"use_kda_recoverssm": True}, "ReplaySSM keeps its states elsewhere"),
    ],
)
def test_layers_that_the_operators_cannot_take_stay_vllms(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    message: str,
) -> None:
    stub = vllm_stub.install(monkeypatch)
    assert register()
    values = {"num_spec": 0, "head_dim": 4, "use_kda_recoverssm": False} | changes
    config = SimpleNamespace(
        hidden_size=4, head_dim=values["head_dim"], num_heads=1, conv_size=4, gate_lower_bound=None
    )
    cache = SimpleNamespace(use_kda_recoverssm=values["use_kda_recoverssm"])
    options = SimpleNamespace(num_spec=values["num_spec"], cache_config=cache, dtype=torch.float32)
    layer = stub.KimiGatedDeltaNetAttention(config, options, NAME)
    assert type(layer) is stub.KimiGatedDeltaNetAttention
    assert f"kda_ops leaves {NAME} to vLLM: {message}" in caplog.text


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(kda_ops.__file__).parent.parent / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    assert [EntryPoint(n, x, "vllm.general_plugins").load() for n, x in points.items()] == [
        register
    ]
