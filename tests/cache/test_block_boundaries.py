"""A server's step writes the states at block boundaries within its prompts."""

import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from kda_ops import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.nn.test_layer import HIDDEN, clone_state, make_layer, make_state
from tests.support.launches import PREFILL, expect, launches

State = tuple[Tensor, Tensor]
BLOCKS: dict[str, Any] = {
    "block_table": [[8, 9], [0, 10], [11, 0]],
    "context_lens": [0, 64, 0],
    "block_tokens": 64,
}
PAGES = 12


def step(layer: KimiDeltaAttention, rows: Tensor, state: State, batch: KDABatch) -> Tensor:
    with torch.no_grad():
        return layer(rows, state=state, batch=batch)


def mixed(**blocks: Any) -> KDABatch:
    """Two decodes and three prompts."""
    return KDABatch.mixed(
        [1, 1], [130, 64, 3], [1, 2, 3, 4, 5], has_initial_state=[False, True, False],
        num_tokens=200, **blocks,
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "compile"), [("SD", False), ("DS", False), ("DS", True)])
def test_states_are_those_of_prefixes(layout: str, compile: bool) -> None:
    layer = make_layer(conv_layout=layout)
    state = make_state(layer, slots=PAGES)
    before = clone_state(state)
    rows = torch.randn(1, 200, HIDDEN)
    call = torch.compile(layer, fullgraph=True) if compile else layer
    plain = clone_state(before)
    expected = step(call, rows, plain, mixed())
    torch.testing.assert_close(step(call, rows, state, mixed(**BLOCKS)), expected)
    for page, slot, continues, start, tokens in (
        (8, 3, False, 2, 64),
        (9, 3, False, 2, 128),
        (10, 4, True, 132, 64),
    ):
        prefix = KDABatch.prefill([tokens], [slot], has_initial_state=[continues])
        alone = clone_state(before)
        step(layer, rows[:, start : start + tokens], alone, prefix)
        for x, y in zip(state, alone, strict=True):
            torch.testing.assert_close(x[page], y[slot])
    for x, y, old in zip(state, plain, before, strict=True):
        torch.testing.assert_close(x[:8], y[:8])
        assert torch.equal(x[11], old[11])


def test_a_prompt_goes_on_from_a_block() -> None:
    """What a prefix cache does: another prompt starts from the state of a block."""
    layer = make_layer()
    state = make_state(layer, slots=PAGES)
    rows = torch.randn(1, 150, HIDDEN)
    table = {"block_table": [[8, 9]], "block_tokens": 64}
    whole = step(layer, rows, state, KDABatch.prefill([150], [1], **table))
    rest = KDABatch.prefill([22], [9], has_initial_state=[True])
    torch.testing.assert_close(step(layer, rows[:, 128:], state, rest), whole[:, 128:])


def test_launches() -> None:
    """Those of a prefill without blocks, and no copy."""
    layer = KimiDeltaAttention(HIDDEN, 64, 1, dtype=torch.bfloat16).requires_grad_(False)
    batch = KDABatch.prefill([130, 64, 3], [1, 2, 3], **BLOCKS)
    rows, state = torch.randn(1, 197, HIDDEN).bfloat16(), make_state(layer, slots=PAGES)
    expect(launches(layer, rows, state=state, batch=batch, dynamic=None), PREFILL)


def test_one_graph_for_all_sizes_of_a_table() -> None:
    """Of prompts and of tokens; one more where the blocks of a prompt change."""
    layer = make_layer()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, backend=counter, fullgraph=True)
    for lengths in ([70], [64, 100], [0, 65, 130, 1]):
        N = len(lengths)
        table = torch.arange(5, 5 + 2 * N).view(N, 2)
        batch = KDABatch.prefill(
            lengths, list(range(1, N + 1)), block_table=table, block_tokens=64,
            context_lens=[0] * N,
        )  # fmt: skip
        state = make_state(layer, slots=14)
        step(call, torch.randn(1, sum(lengths), HIDDEN), state, batch)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tokens": None}, "block_tokens must be an integer, got None"),
        ({"block_tokens": 100}, "block_tokens must be a positive multiple of 64, got 100"),
        ({"block_table": None}, "context_lens must come with block_table"),
        ({"block_table": [[8, 9]]}, "block_table must have shape [3, 2], got (1, 2)"),
        ({"context_lens": [0, 64]}, "context_lens must have shape [3], got (2,)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mixed(**BLOCKS | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": [[8, 2], [0, 10], [0, 0]]}, "writes otherwise, got 2 for sequence 0"),
        ({"block_table": [[8, 4], [0, 10], [0, 0]]}, "writes otherwise, got 4 for sequence 0"),
        ({"block_table": [[8, 12], [0, 10], [0, 0]]}, "block_table must be below 12, got 12"),
        ({"context_lens": [0, 65, 0]}, "context_lens must be multiples of 64 with block_table"),
    ],
)
def test_errors_of_values(change: dict[str, Any], message: str) -> None:
    """Pages of decodes too, before anything is written."""
    layer = make_layer()
    state = make_state(layer, slots=PAGES)
    before = clone_state(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        step(layer, torch.randn(1, 200, HIDDEN), state, mixed(**BLOCKS | change))
    for x, old in zip(state, before, strict=True):
        assert torch.equal(x, old)
