"""States at block boundaries within prompts are, bit for bit, those of the prefixes alone."""

import functools
import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._cases import unpacked, with_pages
from kda_ops.conv.short_conv.cases import short_conv_inputs
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.chunk_kda import kernel
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs
from kda_ops.delta_rule.chunk_kda_gated.cases import chunk_kda_gated_inputs
from kda_ops.delta_rule.chunked import workspace
from kda_ops.delta_rule.chunked.kernels import scan
from kda_ops.tuning import override
from kda_ops.varlen import prepare_chunk_indices
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
kinds = pytest.mark.parametrize("kind", OPERATORS)
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


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kind", "dtype"), [("chunk_kda", FP32), ("chunk_kda", BF16), ("short_conv", BF16)], ids=str
)
def test_kernels_survive_any_tables(kind: str, dtype: torch.dtype) -> None:
    """Wrong values name no page, without a fault."""
    plain = part(of_kind(kind, 0, dtype, FP32), 0, 66)
    inputs = with_table(plain)
    inputs |= {"block_table": inputs["block_table"][:1], "context_lens": torch.tensor([64])}
    table = inputs["block_table"]
    wrong = [
        {"block_table": torch.full_like(table, 2**31 - 1)},
        {"block_table": torch.full((1, 6), -(2**62))},
        {"block_table": table[:, :0]},
        {"context_lens": torch.tensor([2**62])},
        {"context_lens": torch.tensor([-(2**40)])},
        {"context_lens": torch.tensor([62])},
        {"block_tokens": 1 << 20},
    ]
    expected = call(kind, run_kernels, plain)
    assert not same(call(kind, run_kernels, inputs), expected)
    for change in wrong:
        with within_tensors():
            assert same(call(kind, run_kernels, inputs | change), expected), change


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


PAGE = {  # a sequence of 130 tokens with a null one behind it, on four pages
    "state_indices": torch.tensor([1, 0]),
    "block_table": torch.tensor([[2, 3], [9, 9]]),
    "block_tokens": 64,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": None}, "block_tokens must come with block_table, got block_tokens alone"),
        (
            {"block_table": None, "block_tokens": None, "context_lens": torch.zeros(2).int()},
            "context_lens must come with block_table, got context_lens alone",
        ),
        ({"block_table": PAGE["block_table"].float()}, "block_table must have dtype int32, int64"),
        ({"block_table": torch.tensor([2, 3])}, "block_table must have 2 dimensions, got"),
        ({"block_table": torch.tensor([[2, 3]])}, "block_table must have shape [2, 2], got (1, 2)"),
        ({"context_lens": torch.zeros(2)}, "context_lens must have dtype int32, int64, got"),
        ({"context_lens": torch.zeros(1).int()}, "context_lens must have shape [2], got (1,)"),
        ({"block_tokens": None}, "block_tokens must be an integer, got None"),
        ({"block_tokens": 0}, "block_tokens must be a positive multiple of 64, got 0"),
        ({"block_tokens": 96}, "block_tokens must be a positive multiple of 64, got 96"),
        ({"block_tokens": -64}, "block_tokens must be a positive multiple of 64, got -64"),
        (
            {"context_lens": torch.tensor([10, 7])},
            "context_lens must be multiples of 64 with block_table, got 10 for sequence 0",
        ),
        (
            {"context_lens": torch.tensor([-64, 0])},
            "context_lens must be multiples of 64 with block_table, got -64 for sequence 0",
        ),
        ({"block_table": torch.tensor([[2, 4], [0, 0]])}, "block_table must be below 4, got 4"),
        (
            {"block_table": torch.tensor([[3, 3], [0, 0]])},
            "block_table must not name a page that the same call writes otherwise, "
            "got 3 for sequence 0",
        ),
        (
            {"block_table": torch.tensor([[2, 1], [0, 0]])},
            "block_table must not name a page that the same call writes otherwise, "
            "got 1 for sequence 0",
        ),
    ],
)
@kinds
def test_errors(kind: str, change: dict[str, Any], message: str) -> None:
    """Before anything is written."""
    inputs = of_kind(kind, 0, FP32, FP32)
    inputs["cu_seqlens"] = torch.tensor([0, 130, 200])
    inputs.pop("has_initial_state")
    name = "state" if kind in CHUNKED else "conv_state"
    pages = inputs[name]
    inputs[name] = tuple(x[:4] for x in pages) if isinstance(pages, tuple) else pages[:4]
    call(kind, lambda f: f, inputs | PAGE)
    before = [x.clone() for x in states_of(inputs)]
    function = public_function("short_conv_qkv" if kind == "unpacked" else kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**inputs | PAGE | change)
    for x, y in zip(states_of(inputs), before, strict=True):
        assert torch.equal(x.nan_to_num(-7), y.nan_to_num(-7))


@kinds
def test_blocks_are_of_paged_states(kind: str) -> None:
    name = "state" if kind in CHUNKED else "conv_state"
    inputs = of_kind(kind, 0, FP32, FP32) | PAGE
    for other in (name, "state_indices", "has_initial_state"):
        inputs.pop(other)
    inputs["block_table"] = torch.zeros(len(LENGTHS), 2).int()
    function = public_function("short_conv_qkv" if kind == "unpacked" else kind)
    with pytest.raises(ValueError, match=f"block_table must come with {name}, got block_table al"):
        function(**inputs)


def test_a_block_is_longer_than_a_history() -> None:
    state, table = torch.zeros(3, 70, 4), torch.tensor([[1]])
    call = functools.partial(
        kda_ops.short_conv, torch.zeros(80, 4), conv_state=state, layout="SD",
        block_table=table, block_tokens=64,
    )  # fmt: skip
    call(torch.zeros(4, 65))
    with pytest.raises(ValueError, match="weight must have at most 65 taps with block_table"):
        call(torch.zeros(4, 66))


@pytest.mark.parametrize(("kind", "dynamic"), [("chunk_kda", True), ("unpacked", False)])
def test_compiled_for_a_gpu_it_takes_the_same_launches(kind: str, dynamic: bool) -> None:
    inputs = of_kind(kind, 0, BF16, BF16)
    if kind in CHUNKED:
        inputs["chunk_indices"] = prepare_chunk_indices(inputs["cu_seqlens"], T)
    function = public_function("short_conv_qkv" if kind == "unpacked" else kind)
    made = []
    for given in (inputs, with_table(inputs)):
        _, (code,) = cuda_code(
            lambda **x: tensors(function(**x)), **copy_inputs(given), dynamic=dynamic
        )
        made.append(summary(code))
    assert made[0] == made[1]
    assert not made[1].externs


@pytest.mark.parametrize(
    ("target", "columns"), [("sm_80", 32), ("sm_90a", 32), ("sm_90a", 64), ("sm_100a", 32)]
)
def test_the_scan_compiles(columns: int, target: str, tmp_path: Path) -> None:
    """With the stages of a launch on that GPU, and pipelined like the one without blocks."""
    gpu = test_cubin.TARGETS[target]
    copies, spilled = [], []
    for blocks in ({}, {"block_table": torch.tensor([[1, 2]]), "block_tokens": 512}):
        recorder = test_cubin.Recorder()
        inputs = chunk_kda_inputs(CPU, T=512, cu_seqlens=[0, 512]) | blocks
        inputs |= {"state": torch.zeros(4, 1, 128, 128), "state_indices": torch.tensor([3])}
        with (
            mock.patch.object(scan, "traceable", recorder),
            mock.patch.object(kernel, "traceable", recorder),
            mock.patch.object(workspace, "shared_memory", return_value=gpu.shared),
            override({"chunk_scan": {"BV": columns, "STAGES": 3, "num_warps": 4}}),
            torch.no_grad(),
            RunKernels(),
        ):
            kda_ops.chunk_kda(**inputs)
        launch = next(x for x in recorder.launches.values() if "scan" in x.kernel.fn.__name__)
        assert launch.constants["BLOCK_TOKENS"] == (512 if blocks else 0)
        binary = test_cubin.compile_launch(launch, gpu)
        assert binary.metadata.shared <= gpu.shared
        spilled.append(test_cubin.spilled_bytes(binary, gpu, tmp_path))
        copies.append(binary.asm["ptx"].count("cp.async.c"))
    assert spilled[1] <= spilled[0] + 136  # addresses of pages, before and after the loop
    if target != "sm_100a":  # where outputs wait for the next chunk only without blocks
        assert copies[0] < copies[1]  # and the number of the page


@pytest.mark.parametrize("kind", ["short_conv", "short_conv_qkv", "unpacked"])
def test_the_convolution_compiles(kind: str, tmp_path: Path) -> None:
    """Without spills, at a model's sizes."""
    D, state = 3 * 1024, torch.zeros(4, 3, 3 * 1024, dtype=BF16)
    inputs = {
        "x": torch.zeros(1, 512, D, dtype=BF16), "weight": torch.zeros(D, 4, dtype=BF16),
        "conv_state": state, "state_indices": torch.tensor([3]), "layout": "SD",
        "has_initial_state": torch.tensor([True]), "cu_seqlens": torch.tensor([0, 512]),
        "block_table": torch.tensor([[1, 2]]), "context_lens": torch.tensor([0]),
        "block_tokens": 256,
    }  # fmt: skip
    name = "short_conv" if kind == "short_conv" else "short_conv_qkv"
    if kind != "short_conv":
        inputs |= {"key_dim": 1024, "head_dim": 128}
    if kind == "unpacked":
        inputs = unpacked(inputs, (1024, 1024, 1024))
    recorder = test_cubin.Recorder()
    launcher = importlib.import_module(f"kda_ops.conv.{name}.kernel")
    with mock.patch.object(launcher, "traceable", recorder), torch.no_grad(), RunKernels():
        public_function(name)(**inputs)
    (launch,) = recorder.launches.values()
    assert launch.constants["BLOCK_TOKENS"] == 256
    test_cubin.assert_fits(launch, "sm_90a", tmp_path)
