"""A server's steps in three graphs at the most, whatever the counts: 0, 1, equal, or large."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from kda_ops.batch import KDABatch
from kda_ops.layer import KimiDeltaAttention

HIDDEN, SLOTS, STEPS = 32, 40, 150
COLUMNS = 3  # pages of a sequence with two drafts

Compiled = tuple[Callable[..., Any], list[fx.GraphModule]]
dynamic = pytest.mark.parametrize("dynamic", [None, True])


def make_layer(**options: Any) -> KimiDeltaAttention:
    return KimiDeltaAttention(HIDDEN, 8, 2, **options).requires_grad_(False)


def counted(module: nn.Module, dynamic: bool | None) -> Compiled:
    """A compiled module, and the graphs that were made of it so far."""
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
    expected = eager(x.clone(), state=states[0], batch=batch)
    assert torch.equal(call(x, state=states[1], batch=batch, **how), expected)
    for twin in zip(*states, strict=True):
        assert torch.equal(*twin)


@dynamic
@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "speculative"])
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
