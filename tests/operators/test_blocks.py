"""States at block boundaries within prompts are, bit for bit, those of the prefixes alone."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops import fused
from kda_ops._cases import unpacked, with_pages
from kda_ops.conv.short_conv.cases import short_conv_inputs
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs
from kda_ops.delta_rule.chunk_kda_gated.cases import chunk_kda_gated_inputs
from kda_ops.delta_rule.chunked import workspace
from kda_ops.tuning.configs import SM90
from kda_ops.varlen import prepare_chunk_indices
from perf.analysis import sanitize
from tests.operators import test_cubin
from tests.support.bounds import within_tensors
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import RunKernels, public_function, run_kernels
from tests.support.oracle import copy_inputs, tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
LENGTHS = [66, 0, 64, 130, 64]
SLOTS, CONTINUES = [2, 3, 1, 4, 0], [True, True, False, True, True]
CONTEXTS = [64, 128, 0, 192, 0]
PAGES, T = 12, sum(LENGTHS) + 6
# blocks of 64, of each sequence: (column, tokens in the call, page) of those that are written
WRITTEN = [
    [(1, 64, 5)],
    [],
    [(0, 64, 1)],  # on the sequence's own page, where it ends
    [(3, 64, 6), (4, 128, 7)],
    [],
]
OPERATORS = ("chunk_kda", "chunk_kda_gated", "short_conv", "short_conv_qkv", "unpacked")
CHUNKED = OPERATORS[:2]


def of_kind(kind: str, layout: int, dtype: torch.dtype, state_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments without blocks; `layout` is 0 or 1."""
    torch.manual_seed(0)
    offsets = [0, *itertools.accumulate(LENGTHS)]
    if kind in CHUNKED:
        make = chunk_kda_inputs if kind == "chunk_kda" else chunk_kda_gated_inputs
        D = 16 if dtype == FP32 else 64
        inputs = make(CPU, T=T, H=1, HV=2, K=D, V=D, dtype=dtype, cu_seqlens=offsets)
        inputs = with_pages(inputs, SLOTS, [2], state_dtype, more=PAGES - max(SLOTS))
        inputs["state_layout"] = ("VK", "KV")[layout]
        return inputs
    pages = {
        "lengths": LENGTHS, "layout": ("SD", "DS")[layout], "state_indices": SLOTS,
        "initial": CONTINUES, "num_spec": 1, "num_slots": PAGES, "state_dtype": state_dtype,
    }  # fmt: skip
    if kind == "short_conv":
        return short_conv_inputs((T, 12), 4, dtype, **pages, device=CPU)
    inputs = short_conv_qkv_inputs(1, T, 1, 4, 6, dtype, W=3, **pages, device=CPU)
    return unpacked(inputs, (4, 4, 6)) if kind == "unpacked" else inputs


def with_table(inputs: dict[str, Any], tokens: int = 64, others: int = 0) -> dict[str, Any]:
    """The call with the blocks of `WRITTEN`; `others` fills the table."""
    table = torch.full((len(LENGTHS), 6), others, dtype=torch.int32)
    for n, blocks in enumerate(WRITTEN):
        for column, _, page in blocks:
            table[n, column] = page
    table[0, 0] = table[0, 2] = 10  # ends before the call, and after it
    table[4, 0] = 11  # of a sequence without a page of its own
    contexts = torch.tensor(CONTEXTS)
    return {**inputs, "block_table": table, "context_lens": contexts, "block_tokens": tokens}


def part(inputs: dict[str, Any], n: int, tokens: int) -> dict[str, Any]:
    """The call for the first tokens of one sequence alone."""
    start = sum(LENGTHS[:n])

    def cut(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(cut, x))
        if isinstance(x, Tensor) and T in x.shape[:2]:
            return x[start : start + tokens] if x.shape[0] == T else x[:, start : start + tokens]
        return x

    alone = {name: cut(x) for name, x in inputs.items()}
    alone["cu_seqlens"] = torch.tensor([0, tokens], dtype=torch.int32)
    for name in ("state_indices", "has_initial_state"):
        alone[name] = inputs[name][n : n + 1]
    return alone


def states_of(inputs: dict[str, Any]) -> list[Tensor]:
    return tensors([inputs[name] for name in ("state", "conv_state") if name in inputs])


def call(kind: str, way: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Results, then states; inputs stay as they are."""
    inputs = copy_inputs(inputs)
    function = public_function("short_conv_qkv" if kind == "unpacked" else kind)
    with torch.no_grad():
        results = tensors(way(function)(**inputs))
    return [x.nan_to_num(-7) for x in (*results, *states_of(inputs))]


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(**inputs: Any) -> Any:
        def moved(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(moved, x))
            return x.cuda() if isinstance(x, Tensor) else x

        given = {name: moved(x) for name, x in inputs.items()}
        results = [x.cpu() for x in tensors(function(**given))]
        for old, new in zip(states_of(inputs), states_of(given), strict=True):
            old.copy_(new)
        return results

    return run


SAMPLES = [  # operator, dtype, dtype and layout of the state
    ("chunk_kda", FP32, FP32, 0),
    ("chunk_kda", BF16, FP32, 1),
    ("chunk_kda_gated", FP16, BF16, 0),
    ("short_conv", BF16, FP32, 0),
    ("short_conv_qkv", BF16, BF16, 0),
    ("unpacked", FP32, BF16, 1),
]
WAYS = {
    "eager": (lambda f: f, ()),
    "kernel": (run_kernels, pytest.mark.interpreter),
    "gpu": (on_gpu, pytest.mark.gpu),
}


def assert_prefixes(kind: str, way: Callable[..., Any], inputs: dict[str, Any], **how: Any) -> None:
    blocked = call(kind, way, with_table(inputs, **how))
    plain = call(kind, way, inputs)
    states = len(states_of(inputs))
    for found, expected in zip(blocked[:-states], plain[:-states], strict=True):
        assert torch.equal(found, expected)
    named = {page: (n, end) for n, blocks in enumerate(WRITTEN) for _, end, page in blocks}
    for page in range(PAGES):
        expected = plain
        if page in named:
            n, end = named[page]
            expected = [x[[SLOTS[n]]] for x in call(kind, way, part(inputs, n, end))[-states:]]
        for i in range(1, states + 1):
            past = inputs["weight"][0].shape[-1] - 1 if kind not in CHUNKED else 0
            old, found = expected[-i][0 if page in named else page], blocked[-i][page]
            if past and page in named:  # further rows are left as they were
                axis = 0 if inputs["layout"] == "SD" else 1
                found = found.narrow(axis, 0, past)
                old = old.narrow(axis, 0, past)
            assert torch.equal(found, old), f"page {page}"


@pytest.mark.parametrize(
    ("kind", "dtype", "state_dtype", "layout", "way"),
    [
        pytest.param(*sample, way, id=f"{sample[0]}-{str(sample[1])[6:]}-{name}", marks=marks)
        for sample in SAMPLES
        for name, (way, marks) in WAYS.items()
        if (sample[0], name) != ("short_conv_qkv", "kernel")  # slow, and like the unpacked one
    ],
)
def test_states_are_those_of_prefixes_alone(
    kind: str, dtype: torch.dtype, state_dtype: torch.dtype, layout: int, way: Callable[..., Any]
) -> None:
    """And no other page is written, nor does anything else change."""
    assert_prefixes(kind, way, of_kind(kind, layout, dtype, state_dtype))


@pytest.mark.parametrize("kind", ["chunk_kda_gated", "unpacked"])
def test_compiled_states_are_those_of_prefixes_alone(kind: str) -> None:
    """In the C++ kernels too."""
    compiled = functools.cache(functools.partial(torch.compile, fullgraph=True, dynamic=True))
    assert_prefixes(kind, compiled, of_kind(kind, 1, FP32, BF16), others=-3)
