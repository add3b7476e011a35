"""A server's steps need at most three graphs for any counts: 0, 1, equal, or large."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kda_ops._numerics import CHUNK
from kda_ops.cache.batch import SMALL, KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.tuning.example_inputs import NoHintError, hint
from tests.support.as_traced import as_traced

HIDDEN, SLOTS, STEPS = 32, 40, 150
COLUMNS = 3  # pages of a sequence with two drafts

Compiled = tuple[Callable[..., Any], list[fx.GraphModule]]
dynamic = pytest.mark.parametrize("dynamic", [None, True])


def make_layer(**options: Any) -> KimiDeltaAttention:
    return KimiDeltaAttention(HIDDEN, 8, 2, **options).requires_grad_(False)


def counted(module: nn.Module, dynamic: bool | None) -> Compiled:
    """A compiled module, and its graphs so far."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic), graphs


def random_step(speculative: bool, generator: torch.Generator) -> KDABatch:
    """Few sequences of few tokens: 0 and 1 of everything, and equal counts, are frequent."""

    def draw(low: int, high: int, count: int | None = None) -> Any:
        drawn = torch.randint(low, high + 1, (1 if count is None else count,), generator=generator)
        return drawn.tolist() if count is not None else int(drawn)

    decodes, prefills = draw(0, 3), draw(0, 3)
    decodes += decodes + prefills == 0
    N = decodes + prefills
    order = torch.randperm(SLOTS // COLUMNS, generator=generator)[:N] * COLUMNS + 1
    decode_lengths = draw(1, COLUMNS, decodes) if speculative else [1] * decodes
    prefill_lengths = draw(0, draw(1, 90), prefills)
    return KDABatch.mixed(
        decode_lengths,
        prefill_lengths,
        order[:, None] + torch.arange(COLUMNS) if speculative else order,
        has_initial_state=[bool(x) for x in draw(0, 1, prefills)],
        num_accepted=draw(1, COLUMNS, decodes) if speculative else None,
        num_tokens=sum(decode_lengths) + sum(prefill_lengths) + draw(0, 3) * draw(0, 1),
    )


def same_step(
    call: Callable[..., Any], eager: nn.Module, batch: KDABatch, states: list[Any], **how: Any
) -> None:
    x = torch.randn(1, batch.num_tokens, HIDDEN)
    expected = as_traced(eager)(x.clone(), state=states[0], batch=batch)
    assert torch.equal(call(x, state=states[1], batch=batch, **how), expected)
    for twin in zip(*states, strict=True):
        assert torch.equal(*twin)


@pytest.mark.parametrize(
    ("speculative", "dynamic"), [(False, None), (True, True)], ids=["plain", "speculative"]
)
def test_three_graphs_serve_random_steps(speculative: bool, dynamic: bool | None) -> None:
    generator = torch.Generator().manual_seed(int(speculative))
    layer = make_layer(conv_layout="DS" if speculative else "SD")
    call, graphs = counted(layer, dynamic)
    spec = layer.state_spec(num_spec=COLUMNS - 1 if speculative else 0)
    states = [spec.allocate(SLOTS) for _ in range(2)]
    kinds = set()
    for _ in range(STEPS):
        batch = random_step(speculative, generator)
        kinds.add(batch.kind)
        same_step(call, layer, batch, states)
    assert kinds == {"decode", "prefill", "mixed"}
    assert len(graphs) == 3


def serve(
    layer: KimiDeltaAttention,
    call: Callable[..., Any],
    lengths: list[tuple[list[int], list[int]]],
    change: Callable[[Tensor], Tensor],
) -> None:
    """Steps whose rows the caller has computed, against the eager layer."""
    states = [layer.state_spec().allocate(SLOTS) for _ in range(2)]
    for decodes, prefills in lengths:
        batch = KDABatch.mixed(decodes, prefills, list(range(1, 1 + len(decodes + prefills))))
        x = torch.randn(1, batch.num_tokens, HIDDEN)
        expected = as_traced(layer)(x.clone(), state=states[0], batch=batch)
        assert torch.equal(call(change(x), state=states[1], batch=batch), expected)


# of every kind, among them steps of one row and of none
UNEVEN = [([], [5]), ([], [0]), ([], [1]), ([1], []), ([1, 1], []), ([1], [1]), ([0], [9])]


@dynamic
def test_rows_of_a_buffer(dynamic: bool | None) -> None:
    """A part of a larger buffer has a stride that does not follow from its size, as do no rows."""
    layer = make_layer()
    buffer = torch.zeros(1, 64, HIDDEN)
    call, graphs = counted(layer, dynamic)
    serve(layer, call, UNEVEN, lambda x: x)
    serve(layer, call, UNEVEN, lambda x: buffer[:, : x.shape[1]].copy_(x))
    serve(layer, call, UNEVEN, lambda x: torch.cat([buffer[:, :7], x], dim=1)[:, 7:])
    assert len(graphs) == 3


def test_tables_of_a_server() -> None:
    """Columns and rows of larger tables, from anywhere in them."""
    layer = make_layer()
    call, graphs = counted(layer, None)
    state = layer.state_spec().allocate(SLOTS)
    table, offsets = torch.arange(1, 37).view(12, 3), torch.arange(9)
    for first, N in ((0, 2), (4, 1), (7, 5)):
        batch = KDABatch(
            cu_seqlens=offsets[: N + 1],
            state_indices=table[first : first + N, 1],
            has_initial_state=torch.ones(12, dtype=torch.bool)[first : first + N],
            num_decodes=N,
            num_decode_tokens=N,
            num_prefills=0,
            num_prefill_tokens=0,
            num_tokens=N,
        )
        call(torch.randn(1, N, HIDDEN), state=state, batch=batch)
    assert len(graphs) == 1


def test_marked_rows() -> None:
    """`mark_dynamic` on the rows goes together with a batch; the marks of a trace do not stay."""
    layer = make_layer()

    def marked(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        return x

    call, graphs = counted(layer, None)
    serve(layer, call, UNEVEN, marked)
    assert len(graphs) == 3

    batch, x = KDABatch.decode([1, 2]), torch.randn(1, 2, HIDDEN)
    call, graphs = counted(layer, None)
    call(x, state=layer.state_spec().allocate(4), batch=batch)
    assert len(graphs) == 1
    for tensor in (x, batch.counts, batch.cu_seqlens, batch.state_indices):
        assert vars(tensor) == {}


def test_static_when_asked_for() -> None:
    """With `dynamic=False` sizes are constants, and every size has its own graph."""
    layer = make_layer()
    call, graphs = counted(layer, False)
    serve(layer, call, [([1, 1], []), ([1], []), ([1, 1], [])], lambda x: x)
    assert len(graphs) == 2
    for graph in graphs:
        assert not any(
            isinstance(node.meta.get("example_value"), torch.SymInt) for node in graph.graph.nodes
        )


def test_rows_that_do_not_match_the_batch() -> None:
    """A compiled step raises before it writes."""
    layer = make_layer()
    call, _ = counted(layer, None)
    state = layer.state_spec().allocate(6)
    batch = KDABatch.decode([1, 2, 3])
    call(torch.randn(1, 3, HIDDEN), state=state, batch=batch)
    before = [x.clone() for x in state]
    message = re.escape("hidden_states must have shape [1, 3, 32], got (1, 2, 32)")
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(1, 2, HIDDEN), state=state, batch=batch)
    for twin in zip(state, before, strict=True):
        assert torch.equal(*twin)


def test_large_steps_have_their_own_graphs() -> None:
    """Below `SMALL` rows, indices are known to fit 32 bits."""
    layer = make_layer()
    call, graphs = counted(layer, None)
    state = layer.state_spec().allocate(3)
    for rows in (2, SMALL - 1, SMALL, SMALL + 1):
        batch = KDABatch.decode([1], num_tokens=rows)
        call(torch.zeros(1, 1, HIDDEN).expand(1, rows, HIDDEN), state=state, batch=batch)
    bounds = [f"< {SMALL}" in graph.code or f"<= {SMALL - 1}" in graph.code for graph in graphs]
    assert bounds == [True, False]


def test_an_unknown_size_counts_as_its_hint() -> None:
    """Covers tuned kernels and workspaces in slabs."""
    sizes = ShapeEnv()
    rows = sizes.create_unbacked_symint()
    with pytest.raises(NoHintError):
        hint(rows)
    sizes.var_to_hint_override[rows.node.expr] = 128
    assert (hint(rows), hint(rows // CHUNK + 3)) == (128, 5)


class Model(nn.Module):
    """Tokens in; the layer sees rows that the graph has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, HIDDEN)
        self.layers = nn.ModuleList(make_layer() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, state: Any, batch: KDABatch) -> Tensor:
        x = self.embedding(tokens)
        for layer, pages in zip(self.layers, state, strict=True):
            x = x + layer(torch.nn.functional.rms_norm(x, (HIDDEN,)), state=pages, batch=batch)
        return x


def test_marked_tokens_of_a_model() -> None:
    """Rows from another input are dynamic if that input is, and the batch follows."""
    model = Model()
    call, graphs = counted(model, None)
    states = [[layer.state_spec().allocate(SLOTS) for layer in model.layers] for _ in range(2)]
    for decodes, prefills in UNEVEN:
        batch = KDABatch.mixed(decodes, prefills, list(range(1, 1 + len(decodes + prefills))))
        if batch.num_tokens == 0:
            continue
        tokens = torch.randint(0, 50, (1, batch.num_tokens))
        torch._dynamo.decorators.mark_unbacked(tokens, 1)
        assert torch.equal(call(tokens, states[0], batch), model(tokens, states[1], batch))
    assert len(graphs) == 3
