"""A chunk of a prompt after a speculative step continues from the accepted token."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.cache.test_serving_graphs import counted
from tests.nn.test_layer import HIDDEN, clone_state, in_fp64, make_layer, make_state
from tests.support.as_traced import as_traced
from tests.support.oracle import assert_close

NUM_SPEC, PROMPT, CHUNK = 3, 67, 20
ACCEPTED = [1, 3, 4, 2]  # of a step of four tokens each
COPY = torch.ops.kda_ops.state_copy.default
DECODE = [torch.ops.kda_ops.short_conv_update.default, torch.ops.kda_ops.recurrent_kda.default]
PREFILL = [torch.ops.kda_ops.short_conv.state, torch.ops.kda_ops.chunk_kda.state]
SLOTS = torch.arange(1, 17, dtype=torch.int32).view(4, 4)
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])


def speculated(layer: KimiDeltaAttention, x: Tensor) -> tuple[Any, Tensor]:
    """States after a prompt and a speculative step, and what comes next of each sequence.

    The drafts that were not accepted are noise.
    """
    state = make_state(layer, num_spec=NUM_SPEC)
    prompts = x[:, :PROMPT].reshape(1, -1, HIDDEN)
    layer(prompts, state=state, batch=KDABatch.prefill([PROMPT] * 4, SLOTS))
    drafts = torch.randn(4, 1 + NUM_SPEC, HIDDEN, dtype=x.dtype)
    for n, accepted in enumerate(ACCEPTED):
        drafts[n, :accepted] = x[n, PROMPT : PROMPT + accepted]
    step = KDABatch.decode(SLOTS, lengths=[4] * 4, num_accepted=[1] * 4)
    layer(drafts.view(1, -1, HIDDEN), state=state, batch=step)
    rest = [x[n, PROMPT + a : PROMPT + a + CHUNK] for n, a in enumerate(ACCEPTED)]
    return state, torch.stack(rest)


def expected(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
    """The same rows, where every sequence is one prompt."""
    y = layer(x)
    return torch.stack([y[n, PROMPT + a : PROMPT + a + CHUNK] for n, a in enumerate(ACCEPTED)])


@layouts
@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no-conv"])
def test_chunk_continues_from_the_accepted_token(layout: str, conv: bool) -> None:
    """And so do later steps: the chunk in two pieces, then token by token."""
    layer = make_layer(conv_layout=layout, use_short_conv=conv)
    x = torch.randn(4, PROMPT + 1 + NUM_SPEC + CHUNK, HIDDEN)
    state, rest = speculated(layer, x)
    outputs, start = [], 0
    for length, accepted in ((1, ACCEPTED), (CHUNK - 3, [1] * 4)):
        piece = rest[:, start : start + length].reshape(1, -1, HIDDEN)
        batch = KDABatch.prefill(
            [length] * 4, SLOTS, has_initial_state=[True] * 4, num_accepted=accepted
        )
        outputs.append(layer(piece, state=state, batch=batch).view(4, length, HIDDEN))
        start += length
    for t in range(start, CHUNK):
        token = rest[:, t].reshape(1, -1, HIDDEN)
        outputs.append(layer(token, state=state, batch=KDABatch.decode(SLOTS)).view(4, 1, HIDDEN))
    exact = expected(in_fp64(layer), x.double())
    assert_close(torch.cat(outputs, dim=1), expected(layer, x), exact)


@layouts
def test_chunk_with_decodes(layout: str) -> None:
    """Two sequences continue token by token, and two with a chunk each, in one step."""
    layer = make_layer(conv_layout=layout)
    x = torch.randn(4, PROMPT + 1 + NUM_SPEC + CHUNK, HIDDEN)
    state, rest = speculated(layer, x)
    batch = KDABatch.mixed(
        [2, 2],
        [CHUNK, CHUNK],
        SLOTS,
        has_initial_state=[True, True],
        num_accepted=ACCEPTED[:2],
        prefill_num_accepted=ACCEPTED[2:],
    )
    rows = torch.cat([rest[:2, :2].flatten(0, 1), rest[2:].flatten(0, 1)])[None]
    compiled_state = clone_state(state)
    out = as_traced(layer)(rows, state=state, batch=batch)[0]
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(rows, state=compiled_state, batch=batch)[0], out)
    for twin in zip(state, compiled_state, strict=True):
        assert torch.equal(*twin)

    def those(y: Tensor) -> Tensor:
        return torch.cat([y[:2, :2].flatten(0, 1), y[2:].flatten(0, 1)])

    exact = expected(in_fp64(layer), x.double())
    assert_close(out, those(expected(layer, x)), those(exact))


def test_new_prompts_ignore_the_count() -> None:
    layer = make_layer()
    x = torch.randn(2, 9, HIDDEN)
    states = [make_state(layer, num_spec=NUM_SPEC)]
    states.append(clone_state(states[0]))
    rows = x.view(1, -1, HIDDEN)
    plain = KDABatch.prefill([9, 9], SLOTS[:2])
    counted = KDABatch.prefill([9, 9], SLOTS[:2], num_accepted=[3, 99])
    out = [layer(rows, state=s, batch=b) for s, b in zip(states, (plain, counted), strict=True)]
    assert torch.equal(*out)
    for twin in zip(*states, strict=True):
        assert torch.equal(*twin)


def test_one_copy_more() -> None:
    """Only in steps that have the count, and before anything else is written."""
    layer = make_layer()
    state = layer.state_spec(num_spec=NUM_SPEC).allocate(23)
    call, graphs = counted(layer, None)
    for counts in ({}, {"prefill_num_accepted": [2, 3]}):
        batch = KDABatch.mixed([4, 1], [70, 30], SLOTS, has_initial_state=[True, True], **counts)
        call(torch.randn(1, 105, HIDDEN), state=state, batch=batch)
    writes = [
        [node.target for node in graph.graph.nodes if node.target in (COPY, *DECODE, *PREFILL)]
        for graph in graphs
    ]
    assert writes == [[*DECODE, *PREFILL], [COPY, *DECODE, *PREFILL]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_accepted": [5]}, "prefill_num_accepted must be in [1, 4], got 5"),
        ({"num_accepted": [0]}, "prefill_num_accepted must be in [1, 4], got 0"),
        ({"num_accepted": [1, 1]}, "prefill_num_accepted must have shape [1], got (2,)"),
        (
            {"num_accepted": [1], "state_indices": [1]},
            "prefill_num_accepted must come with state_indices of shape [N, 1 + num_spec], "
            "got (1,)",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    good = {"lengths": [5], "state_indices": SLOTS[:1], "has_initial_state": [True]}
    with pytest.raises(ValueError, match=re.escape(message)):
        KDABatch.prefill(**{**good, **arguments})
