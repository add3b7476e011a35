"""The memory of chunked KDA's tiles: it is as documented, bounded, and processing it in slabs
changes no bit of a result.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._cases import Case, named, operator_packages
from kda_ops._registry import OPERATORS as OPERATORS_DEFINED
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs, with_pages, with_states
from kda_ops.delta_rule.chunked import workspace
from kda_ops.delta_rule.chunked.kernels import scan
from kda_ops.delta_rule.chunked.kernels.scan_segments import has_segments
from kda_ops.delta_rule.chunked.workspace import WORKSPACE_BYTES, workspace_bytes
from kda_ops.tuning import override
from kda_ops.tuning.configs import DEFAULTS, SM90, row_for
from kda_ops.varlen import prepare_chunk_indices
from perf.analysis import sanitize
from tests.operators import test_cubin
from tests.support.bounds import within_tensors
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import RunKernels, cases, public_function, run_kernels
from tests.support.oracle import assert_accurate, copy_inputs, evaluate, poisoned

CPU = torch.device("cpu")
OPERATORS = ("chunk_kda", "chunk_kda_gated")
AFFINE = named(cases("chunk_kda_gated_affine"), "ragged-norm", "fp16-norm-large", "fp32-ragged")
CASES = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in OPERATORS
    for case in cases(name, kernels=True)
]
# of the same launches, few
CASES += [
    pytest.param("chunk_kda_gated_affine", case, id=f"chunk_kda_gated_affine-{case.name}")
    for case in AFFINE
]
BF16 = torch.bfloat16


def in_slabs_of(rows: int) -> Any:
    """Limits workspaces to that many rows."""

    def slabs(found: int, *sizes: Any) -> int:
        return max(-(-found // rows), 1)

    return mock.patch.object(workspace, "workspace_slabs", slabs)


def assert_slabs_change_nothing(function: Any, name: str, case: Case, device: str) -> None:
    torch.manual_seed(0)
    inputs = case.make(torch.device(device))
    whole = evaluate(function, copy_inputs(inputs), case.mutated)
    bounds = within_tensors() if device == "cpu" else contextlib.nullcontext()
    with in_slabs_of(1), poisoned(), bounds:
        parts = evaluate(function, copy_inputs(inputs), case.mutated)
    for part, expected in zip(parts, whole, strict=True):
        assert torch.equal(part.nan_to_num(), expected.nan_to_num())


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "case"), CASES)
def test_slabs_change_nothing(name: str, case: Case) -> None:
    assert_slabs_change_nothing(run_kernels(public_function(name)), name, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), CASES)
def test_slabs_change_nothing_on_the_gpu(name: str, case: Case) -> None:
    assert_slabs_change_nothing(public_function(name), name, case, "cuda")


@contextlib.contextmanager
def recording(name: str, traceable: Any) -> Iterator[None]:
    """An operator's launches go to `traceable`."""
    with contextlib.ExitStack() as patches:
        for module in (f"{operator_packages()[name]}.kernel", *test_cubin.SHARED):
            importlib.import_module(module)
            if hasattr(sys.modules[module], "traceable"):
                patches.enter_context(mock.patch.multiple(sys.modules[module], traceable=traceable))
        yield


def launched(sizes: dict[str, Any], limit: int) -> tuple[int, int]:
    """Bytes that `chunk_kda` allocates besides its results, and the kernels it launches."""
    kernels, allocated = [], []
    empty, recorder = torch.empty, test_cubin.Recorder()

    def traceable(kernel: Any) -> Any:
        kernels.append(kernel)
        return recorder(kernel)

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    inputs = with_states(chunk_kda_inputs(CPU, **sizes))
    with (
        recording("chunk_kda", traceable),
        mock.patch.object(torch, "empty", counted),
        mock.patch.object(workspace, "WORKSPACE_BYTES", limit),
        torch.no_grad(),
        RunKernels(),
    ):
        results = kda_ops.chunk_kda(**inputs)
    return sum(x.nbytes for x in allocated) - sum(x.nbytes for x in results), len(kernels)


@pytest.mark.parametrize("limit", [WORKSPACE_BYTES, 300_000], ids=["whole", "slabs"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1000, "H": 4},
        {"B": 3, "T": 200, "H": 2, "HV": 4, "K": 64},
        {"T": 700, "dtype": torch.float16},
        {"T": 700, "K": 48, "V": 80},
        {"T": 500, "K": 24, "V": 16, "dtype": torch.float32},
        {"T": 900, "cu_seqlens": [0, 100, 100, 850]},
    ],
    ids=str,
)
def test_workspace_bytes_is_what_it_allocates(sizes: dict[str, Any], limit: int) -> None:
    sizes = {"B": 1, "H": 1, "K": 128, "V": 128, "dtype": BF16, **sizes}
    sequences = len(sizes["cu_seqlens"]) - 1 if "cu_seqlens" in sizes else sizes["B"]
    with mock.patch.object(workspace, "WORKSPACE_BYTES", limit):
        said = workspace_bytes(
            sizes["B"] * sizes["T"],
            sizes.get("HV", sizes["H"]),
            sizes["K"],
            sizes["V"],
            sequences=sequences,
            dtype=sizes["dtype"],
        )
    taken, launches = launched(sizes, limit)
    assert taken == said
    assert launches == 2 if limit == WORKSPACE_BYTES else launches > 2


def test_a_ragged_batch_needs_its_chunk_table() -> None:
    """Also if the operator is called directly: not as one long sequence."""
    inputs = chunk_kda_inputs(CPU, T=70, K=64, V=64, cu_seqlens=[0, 30, 70])
    arguments = [inputs[name] for name in ("q", "k", "v", "g_cumsum", "beta")]
    launch = OPERATORS_DEFINED[torch.ops.kda_ops.chunk_kda.default].launcher
    with pytest.raises(ValueError, match="chunk_indices must be given with cu_seqlens, got None"):
        launch(*arguments, 1.0, None, False, inputs["cu_seqlens"], None)


def test_kimi_linear_at_8192_tokens_is_one_slab() -> None:
    assert workspace_bytes(8192, 32, 128, 128) == 129 * 32 * 57_856 <= WORKSPACE_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(8192, 96), (32768, 32), (1 << 20, 64)])
def test_long_inputs_stay_below_the_limit(tokens: int, heads: int, dtype: torch.dtype) -> None:
    states = 4 * heads * 128 * 128
    assert workspace_bytes(tokens, heads, 128, 128, dtype=dtype) <= WORKSPACE_BYTES + states


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("pages", [False, True], ids=["fixed", "ragged"])
def test_a_compiled_slab_is_two_launches(pages: bool, dynamic: bool) -> None:
    """Also with a symbolic number of tokens: as many slabs as the first call needs."""
    sizes = {"K": 64, "V": 64, "cu_seqlens": [0, 70, 160] if pages else None}
    inputs = chunk_kda_inputs(CPU, T=300, **sizes)
    if pages:
        inputs = with_pages(inputs, [1, 2], [0])
        inputs["chunk_indices"] = prepare_chunk_indices(inputs["cu_seqlens"], 300)
    else:
        inputs = with_states(inputs)
    row = workspace_bytes(0, 1, 64, 64)
    with mock.patch.object(workspace, "WORKSPACE_BYTES", 2 * row):
        _, (code,) = cuda_code(
            lambda **x: kda_ops.chunk_kda(**x)[0], **copy_inputs(inputs), dynamic=dynamic
        )
    slabs = 3
    assert summary(code).launches == ["chunk_prepare_kernel", "chunk_scan_kernel"] * slabs
    assert not summary(code).externs


@pytest.mark.parametrize(("heads", "scans"), [(66, 1), (67, 2), (96, 2), (98, 2), (99, 1)])
def test_heads_left_over_after_a_full_wave_are_launched_separately(heads: int, scans: int) -> None:
    """An H200 has 132 multiprocessors, and a head takes two programs; with up to 32 heads four or
    more.
    """
    inputs = chunk_kda_inputs(CPU, T=70, H=heads, K=64, V=128)
    _, (code,) = cuda_code(lambda **x: kda_ops.chunk_kda(**x)[0], **inputs)
    expected = ["chunk_prepare_kernel", *["chunk_scan_kernel"] * scans]
    assert summary(code).launches == expected


@pytest.mark.interpreter
@pytest.mark.parametrize("slabs", [False, True], ids=["whole", "slabs"])
def test_groups_of_heads_change_nothing(slabs: bool) -> None:
    inputs = with_states(chunk_kda_inputs(CPU, B=2, T=150, H=3, K=64, V=64, dtype=BF16))
    with RunKernels(), torch.no_grad():
        whole = kda_ops.chunk_kda(**inputs)
        groups = mock.patch.object(scan, "scan_groups", return_value=[(0, 2), (2, 3), (5, 1)])
        with groups, poisoned(), in_slabs_of(1) if slabs else contextlib.nullcontext():
            parts = kda_ops.chunk_kda(**inputs)
    for part, expected in zip(parts, whole, strict=True):
        assert torch.equal(part, expected)


@contextlib.contextmanager
def in_segments(count: int) -> Iterator[None]:
    """Sequences are scanned in that many segments."""
    first_pass = mock.patch.object(scan, "launch_segments", wraps=scan.launch_segments)
    with sanitize.in_segments(count), first_pass as launched:
        yield
    assert launched.called


def takes_segments(case: Case) -> bool:
    q = case.make(CPU)["q"]
    return has_segments(q.dtype, q.shape[-1])


segmented_cases = pytest.mark.parametrize(
    ("name", "case"), [param for param in CASES if takes_segments(param.values[1])]
)


def long_case(gate: str, dtype: torch.dtype, D: int) -> Case:
    """Several chunks in each of several segments, and sequences without one."""
    offsets = [0, 0, 1, 400, 400, 580, 700]

    def make(device: torch.device) -> dict[str, Any]:
        sizes = {"T": 720, "K": D, "V": D, "cu_seqlens": offsets}
        return with_states(chunk_kda_inputs(device, **sizes, gate=gate, dtype=dtype))

    return Case(name=gate, make=make, operand_dtype=dtype)


long_cases = pytest.mark.parametrize(
    ("gate", "dtype"),
    [("slow", BF16), ("slow", torch.float16), ("softplus", BF16), ("harsh", BF16)],
    ids=str,
)


@pytest.mark.interpreter
@long_cases
def test_long_segments_in_the_interpreter(gate: str, dtype: torch.dtype) -> None:
    with in_segments(4), within_tensors():
        function = run_kernels(kda_ops.chunk_kda)
        assert_accurate(function, kda_ops.chunk_kda, long_case(gate, dtype, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [2, 4])
@long_cases
def test_long_segments_on_the_gpu(gate: str, dtype: torch.dtype, segments: int) -> None:
    with in_segments(segments):
        case = long_case(gate, dtype, 128)
        assert_accurate(kda_ops.chunk_kda, kda_ops.chunk_kda, case, device="cuda")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("tokens", "heads", "segmented"), [(2048, 8, True), (1900, 8, False), (2048, 32, False)]
)
def test_few_heads_are_scanned_in_segments(
    tokens: int, heads: int, segmented: bool, dynamic: bool
) -> None:
    inputs = chunk_kda_inputs(CPU, T=tokens, H=heads, K=64, V=64)
    _, (code,) = cuda_code(lambda **x: kda_ops.chunk_kda(**x)[0], **inputs, dynamic=dynamic)
    first_pass = ["chunk_segments_kernel"] if segmented else []
    assert summary(code).launches == ["chunk_prepare_kernel", *first_pass, "chunk_scan_kernel"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a", "sm_120"])
def test_segments_compile(target: str, tmp_path: Path) -> None:
    recorder = test_cubin.Recorder()
    inputs = with_states(chunk_kda_inputs(CPU, T=512, H=8))
    shared = test_cubin.TARGETS[target].shared
    table = SM90 if target == "sm_90a" else DEFAULTS
    with (
        recording("chunk_kda", recorder),
        override({"chunk_segments": row_for(table["chunk_segments"], {})}),
        in_segments(4),
        mock.patch.object(workspace, "shared_memory", return_value=shared),
        torch.no_grad(),
        RunKernels(),
    ):
        kda_ops.chunk_kda(**inputs)
    launches = {launch.kernel.fn.__name__: launch for launch in recorder.launches.values()}
    for name in ("chunk_segments_kernel", "chunk_scan_kernel"):
        assert launches[name].constants["SEGMENTS"] == 4
        test_cubin.assert_fits(launches[name], target, tmp_path)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("segments", "rows"), [(3, None), (2, 1), (5, 3)], ids=["whole", "slabs", "wide-slabs"]
)
@segmented_cases
def test_segments_in_the_interpreter(
    name: str, case: Case, segments: int, rows: int | None
) -> None:
    function = public_function(name)
    with (
        within_tensors(),
        in_segments(segments),
        contextlib.nullcontext() if rows is None else in_slabs_of(rows),
    ):
        assert_accurate(run_kernels(function), function, case)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [2, 5])
@segmented_cases
def test_segments_on_the_gpu(name: str, case: Case, segments: int) -> None:
    function = public_function(name)
    with in_segments(segments):
        assert_accurate(function, function, case, device="cuda")


@pytest.mark.parametrize("name", OPERATORS)
def test_slabs_compile(name: str, tmp_path: Path) -> None:
    """For one GPU: they differ from a whole workspace in how a program finds its chunk alone."""
    recorder = test_cubin.Recorder()
    case = cases(name, perf=True)[0]
    with recording(name, recorder), in_slabs_of(64), torch.no_grad(), RunKernels():
        public_function(name)(**case.make(CPU))
    assert len(recorder.launches) >= 2
    for launch in recorder.launches.values():
        assert launch.constants["SLABS"]
        test_cubin.assert_fits(launch, "sm_90a", tmp_path)
