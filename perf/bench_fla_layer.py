"""FLA's own layer at Kimi-Linear's sizes: as it is, eager, and patched by
`kda_ops.integrations.fla`, compiled as one graph. Forward, and a training step: the gradients of
its input and all parameters.

Forward is checked against the references, gradients against those of FLA's layer as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kda_ops.integrations.fla import patch, unpatch
from perf.baselines.fla import fla
from perf.bench_layer import (
    HEADS,
    HIDDEN,
    TOKENS,
    WEIGHTS,
    fla_layer_like,
    layer,
    prefill_inputs,
    references,
    theirs,
)
from perf.bench_training import fla_step, layer_inputs, step_of, trained_fla_layer
from perf.harness.rows import COMPILED, Call, Inputs, Prepare, Row

GRADIENTS_AGREE = 0.05  # two sides in bf16, each off by 0.5 % from fp32, and sums that cancel
CASE = f"T{TOKENS}-H{HEADS}"


@functools.cache
def compiled_layer(training: bool) -> Any:
    """Made once for all sets of inputs, compiled while FLA is patched."""
    module = trained_fla_layer() if training else fla_layer_like(layer())
    return torch.compile(module, fullgraph=True, dynamic=False)


def patched(inputs: Inputs) -> Call:
    """Patches FLA, until the row has been measured."""
    patch()
    return lambda: compiled_layer(False)(**inputs)[0]


def patched_step(inputs: Inputs) -> Call:
    patch()
    return step_of(trained_fla_layer(), compiled_layer(True), inputs)


def rows_of(stage: str, sides: dict[str, Prepare], **common: Any) -> list[Row]:
    """Nothing where FLA is not installed."""
    return [
        Row(stage=stage, case=CASE, provider=provider, prepare=prepare, poison=False, **common)
        for provider, prepare in sides.items()
    ]


def sides(theirs: Prepare, ours: Prepare) -> dict[str, Prepare]:
    found = {f"{name}, eager": prepare for name, prepare in fla(theirs).items()}
    return found | {COMPILED: ours} if found else {}


ROWS = [
    *rows_of(
        "FLA layer",
        sides(theirs, patched),
        make=prefill_inputs,
        expected=references,
        bytes_moved=2 * 2 * TOKENS * HIDDEN + 2 * WEIGHTS,
        flops=2 * TOKENS * WEIGHTS,
    ),
    *rows_of(
        "FLA layer training",
        sides(fla_step, patched_step),
        make=functools.partial(layer_inputs, tokens=TOKENS),
        expected=fla_step,
        bytes_moved=3 * 2 * WEIGHTS,
        flops=6 * TOKENS * WEIGHTS,
        graph=False,
        limit=GRADIENTS_AGREE,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_fla_layer(row: Row, measure: Callable[[Row], None]) -> None:
    try:
        measure(row)
    finally:
        unpatch()
