"""The compiled layer on a GPU: every kind of call against fp64, and CUDA graphs of a decode step
that write the pages in place.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._dynamo.utils import counters

from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.cache.test_prefill_after_speculation import ACCEPTED, CHUNK, NUM_SPEC, PROMPT, speculated
from tests.cache.test_prefill_after_speculation import SLOTS as PAGES
from tests.cache.test_serving_graphs import COLUMNS, random_step
from tests.cache.test_serving_graphs import SLOTS as SERVED
from tests.lowering.test_launch_contract import Sliced
from tests.nn.test_layer import (
    BF16,
    GATES,
    HIDDEN,
    SLOTS,
    State,
    in_fp64,
    make_state,
    mode_arguments,
)
from tests.support.oracle import assert_close

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MODES = ["one", "batch", "varlen", "prefill", "decode", "speculative", "mixed"]
STEPS, SEQUENCES = 100, 6
every_layout = pytest.mark.parametrize("layout", ["SD", "DS"])
every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
# PyTorch starts its tree of graphs with an empty one
starts_a_tree = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")


def make_layer(layout: str, gate: dict[str, Any], K: int = 64) -> KimiDeltaAttention:
    """K of 64 uses the kernels of real sizes."""
    layer = KimiDeltaAttention(HIDDEN, K, 2, conv_layout=layout, dtype=BF16, **gate)
    torch.nn.init.normal_(layer.o_norm_weight, 1.0, 0.2)
    return layer.requires_grad_(False)


def moved(x: Any) -> Any:
    """An argument of the layer on the device, pages with their strides."""
    if isinstance(x, tuple):
        return tuple(map(moved, x))
    if isinstance(x, KDABatch):
        fields = [field.name for field in dataclasses.fields(x) if field.init]
        return KDABatch(**{name: moved(getattr(x, name)) for name in fields})
    if isinstance(x, Tensor):
        twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
        return twin.copy_(x)
    return x


def in_double(state: State) -> State:
    conv, recurrent = state
    return None if conv is None else conv.double(), recurrent.double()


@every_gate
@every_layout
@pytest.mark.parametrize("mode", MODES)
def test_compiled_against_fp64(mode: str, layout: str, gate: dict[str, Any]) -> None:
    """The first length static, the others in one dynamic graph."""
    layer = make_layer(layout, gate)
    compiled = torch.compile(copy.deepcopy(layer).to(DEVICE), fullgraph=True)
    for size in range(3):
        inputs = mode_arguments(mode, layer, size)
        on_device = {name: moved(x) for name, x in inputs.items()}
        exact = {**inputs, "hidden_states": inputs["hidden_states"].double()}
        if "state" in inputs:
            exact["state"] = in_double(inputs["state"])
        out = compiled(**on_device)
        assert_close(out, layer(**inputs), in_fp64(layer)(**exact))
        if "state" in inputs:
            states = (on_device["state"], inputs["state"], exact["state"])
            for s, r, e in zip(*states, strict=True):
                assert_close(s, r, e, operand_dtype=BF16)


@starts_a_tree
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "speculative"])
def test_three_graphs_serve_random_steps(speculative: bool, mode: str | None) -> None:
    """Through Inductor, with graphs captured per size or without; states and rows against fp64."""
    generator = torch.Generator().manual_seed(int(speculative))
    layer = KimiDeltaAttention(32, 64, 2, dtype=BF16, conv_layout="DS").requires_grad_(False)
    on_device = copy.deepcopy(layer).to(DEVICE)
    compiled = torch.compile(on_device, fullgraph=True, mode=mode)
    spec = layer.state_spec(num_spec=COLUMNS - 1 if speculative else 0)
    reference = spec.allocate(SERVED)
    exact, state = in_double(reference), moved(reference)
    for x in state:
        torch._dynamo.mark_static_address(x)
    counters.clear()
    for _ in range(40):
        batch = random_step(speculative, generator)
        x = torch.randn(1, batch.num_tokens, 32, dtype=BF16)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(moved(x), state=state, batch=moved(batch)).clone()
        expected = layer(x, state=reference, batch=batch)
        assert_close(out, expected, in_fp64(layer)(x.double(), state=exact, batch=batch))
    for s, r, e in zip(state, reference, exact, strict=True):
        assert_close(s, r, e, operand_dtype=BF16)
    assert counters["stats"]["unique_graphs"] == 3


@every_layout
def test_chunk_after_a_speculative_step(layout: str) -> None:
    layer = make_layer(layout, {})
    x = torch.randn(4, PROMPT + 1 + NUM_SPEC + CHUNK, HIDDEN, dtype=BF16)
    state, rest = speculated(layer, x)
    chunk = rest.reshape(1, -1, HIDDEN)
    batch = KDABatch.prefill(
        [CHUNK] * 4, PAGES, has_initial_state=[True] * 4, num_accepted=ACCEPTED
    )
    exact = in_double(state)
    call = torch.compile(copy.deepcopy(layer).to(DEVICE), fullgraph=True)
    on_device = moved(state)
    out = call(moved(chunk), state=on_device, batch=moved(batch))
    expected = layer(chunk, state=state, batch=batch)
    assert_close(out, expected, in_fp64(layer)(chunk.double(), state=exact, batch=batch))
    for s, r, e in zip(on_device, state, exact, strict=True):
        assert_close(s, r, e, operand_dtype=BF16)


@pytest.mark.parametrize("entries", [1, 3])
def test_padded_rows_of_a_projection(entries: int) -> None:
    """Rows are read as Inductor padded them; see `tests/lowering/test_launch_contract.py`."""
    sliced = Sliced().to(DEVICE).requires_grad_(False)
    x = torch.randn(entries, 130, HIDDEN, dtype=BF16, device=DEVICE)
    with inductor_config.patch(padding_stride_threshold=0):
        out = torch.compile(sliced, fullgraph=True)(x)
    exact = copy.deepcopy(sliced).cpu().double()(x.cpu().double())
    for y, reference, e in zip(out, sliced(x), exact, strict=True):
        assert_close(y, reference.cpu(), e)


@starts_a_tree
@every_gate
@every_layout
def test_cuda_graphs_of_a_decode_step(layout: str, gate: dict[str, Any]) -> None:
    """`mode="reduce-overhead"`: one graph, replayed with other slots and tokens in every step."""
    from torch._inductor import cudagraph_trees

    layer = make_layer(layout, gate)
    exact_layer = in_fp64(layer)
    on_device = copy.deepcopy(layer).to(DEVICE)
    compiled = torch.compile(on_device, fullgraph=True, dynamic=False, mode="reduce-overhead")
    reference = make_state(layer)
    exact, eager, state = in_double(reference), moved(reference), moved(reference)
    for x in state:  # what a graph writes in place must have a static address
        torch._dynamo.mark_static_address(x)
    counters.clear()
    with torch.no_grad():
        for step in range(STEPS):
            slots = torch.randperm(SLOTS - 1)[:SEQUENCES] + 1
            slots[step % SEQUENCES] = 0 if step % 3 == 0 else slots[step % SEQUENCES]
            x = torch.randn(1, SEQUENCES, HIDDEN, dtype=BF16)
            batch = KDABatch.decode(slots)
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(moved(x), state=state, batch=moved(batch)).clone()
            expected = on_device(moved(x), state=eager, batch=moved(batch))
            assert_close(out, expected.cpu(), exact_layer(x.double(), state=exact, batch=batch))
    for s, r, e in zip(state, eager, exact, strict=True):
        assert_close(s, r.cpu(), e, operand_dtype=BF16)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1
    manager = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None
    assert any(manager.roots.values()), "nothing was captured"
