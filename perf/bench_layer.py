"""A whole layer at Kimi-Linear's sizes (hidden 2304, 32 heads of 128), prefill of 8192 tokens,
against FLA's layer with the same weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kda_ops.layer import KimiDeltaAttention
from perf.peers import fla, fla_layer_like
from perf.rows import COMPILED, OURS, Call, Inputs, Row, RunReferences

HIDDEN, HEADS, HEAD_DIM, TOKENS = 2304, 32, 128, 8192


@functools.cache
def layer() -> KimiDeltaAttention:
    """bf16 weights; rates and biases of the gate stay fp32. Made once: all rows have the same
    weights.
    """
    torch.manual_seed(0)
    return KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS, device="cuda", dtype=torch.bfloat16).eval()


def layer_inputs(device: torch.device) -> Inputs:
    return {"hidden_states": torch.randn(1, TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)}


def layer_flops() -> int:
    """The projections: q, k, v, o; the gates' low-rank pairs; beta."""
    width = HEADS * HEAD_DIM
    weights = 4 * HIDDEN * width + 2 * (HIDDEN * HEAD_DIM + HEAD_DIM * width) + HIDDEN * HEADS
    return 2 * TOKENS * weights


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


def theirs(inputs: Inputs) -> Call:
    module = fla_layer_like(layer())
    return lambda: module(**inputs)[0]


COMMON: dict[str, Any] = {
    "stage": "layer",
    "case": f"prefill-T{TOKENS}-H{HEADS}",
    "make": layer_inputs,
    "expected": references,
    "bytes_moved": 2 * 2 * TOKENS * HIDDEN,
    "flops": layer_flops(),
}
ROWS = [
    *(Row(who=f"{who}, eager", prepare=prepare, **COMMON) for who, prepare in fla(theirs).items()),
    Row(who=OURS, prepare=eager, **COMMON),
    Row(who=COMPILED, prepare=compiled, poison=False, **COMMON),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_layer(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
