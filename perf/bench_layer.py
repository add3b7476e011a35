"""A whole layer at Kimi-Linear's sizes: hidden 2304, 32 heads, head size 128.

Prefill of 8192 tokens against FLA's layer with the same weights, eager and compiled, and one decode
step on paged states, which FLA's layer does not have.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kda_ops.cache.batch import KDABatch
from kda_ops.demos.training.baseline import fla_layer
from kda_ops.nn.layer import KimiDeltaAttention
from perf.baselines.fla import fla
from perf.harness.rows import COMPILED, OURS, Call, Inputs, Row, RunReferences

HIDDEN, HEADS, HEAD_DIM, TOKENS = 2304, 32, 128, 8192
WIDTH = HEADS * HEAD_DIM
# FLA's compiled layer breaks into some fourteen graphs; after this time the row is abandoned
COMPILE_SECONDS = 150
# q, k, v, o; the low-rank pairs of the two gates; beta
WEIGHTS = 4 * HIDDEN * WIDTH + 2 * (HIDDEN * HEAD_DIM + HEAD_DIM * WIDTH) + HIDDEN * HEADS


@functools.cache
def layer() -> KimiDeltaAttention:
    """bf16 weights; rates and biases of the gate stay fp32. Made once, shared by all rows."""
    torch.manual_seed(0)
    return KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS, device="cuda", dtype=torch.bfloat16).eval()


def prefill_inputs(device: torch.device) -> Inputs:
    return {"hidden_states": torch.randn(1, TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)}


def decode_inputs(device: torch.device, sequences: int) -> Inputs:
    """One token per sequence, with one page per sequence."""
    state = layer().state_spec().allocate(sequences + 1, device=device)
    for pages in state:
        pages.normal_()
    return {
        "hidden_states": torch.randn(1, sequences, HIDDEN, device=device, dtype=torch.bfloat16),
        "state": state,
        "batch": KDABatch.decode(range(1, sequences + 1), device=device),
    }


def eager(inputs: Inputs) -> Call:
    return lambda: layer()(**inputs)


def compiled(inputs: Inputs) -> Call:
    fast = torch.compile(layer(), fullgraph=True)
    return lambda: fast(**inputs)


def references(inputs: Inputs) -> Call:
    def call() -> Any:
        with RunReferences():
            return layer()(**inputs)

    return call


@functools.cache
def fla_layer_like(ours: KimiDeltaAttention) -> torch.nn.Module:
    """FLA's layer with the weights of ours."""
    return fla_layer(ours).eval()


def theirs(inputs: Inputs) -> Call:
    module = fla_layer_like(layer())
    return lambda: module(**inputs)[0]


@functools.cache
def their_compiled_layer() -> Any:
    return torch.compile(fla_layer_like(layer()), dynamic=False)


def theirs_compiled(inputs: Inputs) -> Call:
    return lambda: their_compiled_layer()(**inputs)[0]


def layer_rows(case: str, baselines: dict[str, Any], **common: Any) -> list[Row]:
    common |= {"stage": "layer", "case": case, "expected": references}
    mutated = ("state",) if case.startswith("decode") else ()
    return [
        *(
            Row(
                provider=provider,
                prepare=prepare,
                poison=False,
                graph="compiled" not in provider,
                **common,
            )
            for provider, prepare in baselines.items()
        ),
        Row(provider=OURS, prepare=eager, mutated=mutated, **common),
        Row(provider=COMPILED, prepare=compiled, mutated=mutated, poison=False, **common),
    ]


def decode_rows(sequences: int) -> list[Row]:
    states = 2 * (4 * WIDTH * HEAD_DIM + 2 * 3 * 3 * WIDTH)  # read and written
    return layer_rows(
        f"decode-batch{sequences}-H{HEADS}",
        {},
        make=lambda device: decode_inputs(device, sequences),
        bytes_moved=2 * WEIGHTS + sequences * (states + 2 * 2 * HIDDEN),
        flops=2 * sequences * WEIGHTS,
    )


ROWS = [
    *layer_rows(
        f"prefill-T{TOKENS}-H{HEADS}",
        {f"{provider}, eager": theirs for provider in fla(theirs)}
        | {f"{provider}, compiled": theirs_compiled for provider in fla(theirs)},
        make=prefill_inputs,
        bytes_moved=2 * 2 * TOKENS * HIDDEN + 2 * WEIGHTS,
        flops=2 * TOKENS * WEIGHTS,
    ),
    *decode_rows(1),
    *decode_rows(64),
]


def with_limit(row: Row) -> Any:
    """The row as a benchmark parameter, with a time limit if it compiles FLA's layer."""
    slow = row.prepare is theirs_compiled
    marks = [pytest.mark.timeout(COMPILE_SECONDS)] if slow else []
    return pytest.param(row, id=str(row), marks=marks)


@pytest.mark.parametrize("row", [with_limit(row) for row in ROWS])
def bench_layer(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
