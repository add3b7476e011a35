"""`chunk_kda` beyond the common cases: definition, pieces, gradients, padding, pages, errors."""

import importlib
import itertools
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunk_kda.cases import (
    chunk_kda_inputs,
    cumulative,
    log2_gate,
    with_pages,
    with_states,
)
from kda_ops.delta_rule.chunked import workspace
from kda_ops.varlen import prepare_chunk_indices
from tests.operators import test_cubin
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import RunKernels, run_kernels
from tests.support.oracle import assert_close, copy_inputs

CPU = torch.device("cpu")
FP64 = torch.float64
TOKENS = ("q", "k", "v", "g_cumsum", "beta")
FROBENIUS = 0.005  # the best baseline's error in bf16
RAGGED = [0, 0, 1, 66, 66, 130, 150]


def exact_inputs(T: int, gate: str = "softplus", seed: int = 0, **sizes: Any) -> tuple[Any, Tensor]:
    """fp64 inputs with states, and the per-token gates behind their G."""
    torch.manual_seed(seed)
    inputs = chunk_kda_inputs(CPU, T=T, dtype=FP64, **sizes)
    y = log2_gate(tuple(inputs["g_cumsum"].shape), gate, CPU).double()
    cu_seqlens = inputs.get("cu_seqlens")
    inputs["g_cumsum"] = cumulative(y, None if cu_seqlens is None else cu_seqlens.tolist())
    inputs["beta"] = inputs["beta"].double()
    return with_states(inputs, FP64), y


def kernel_module() -> Any:
    """Looked up by name: `kda_ops.chunk_kda` is the function."""
    return importlib.import_module("kda_ops.delta_rule.chunk_kda.kernel")


def shared_module() -> Any:
    return importlib.import_module("kda_ops.delta_rule.chunked.kernels.scan")


def step_by_step(inputs: dict[str, Any], y: Tensor, start: int, end: int, b: int, n: int) -> Any:
    """The definition, token by token: outputs `[tokens, HV, V]` and final state `[HV, V, K]`."""
    q, k, v, beta = (inputs[name][b, start:end] for name in ("q", "k", "v", "beta"))
    (H, K), HV = q.shape[1:], v.shape[1]
    o, states = torch.zeros_like(v), []
    for h in range(HV):
        S = inputs["initial_state"][n, h].T
        key = h // (HV // H)
        for t in range(end - start):
            S = torch.diag(torch.exp2(y[b, start + t, h])) @ S
            S = S + beta[t, h] * torch.outer(k[t, key], v[t, h] - S.T @ k[t, key])
            o[t, h] = K**-0.5 * (S.T @ q[t, key])
        states.append(S.T)
    return o, torch.stack(states)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding in fp64 sums over a sequence."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 256 * torch.finfo(FP64).eps * b.abs().max()


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("gate", ["softplus", "harsh", "slow", "bounded"])
def test_reference_is_the_definition(gate: str) -> None:
    inputs, y = exact_inputs(150, gate, B=2, H=2, HV=4, K=24, V=40)
    o, final = kda_ops.chunk_kda(**inputs)
    for b in range(2):
        expected_o, expected_final = step_by_step(inputs, y, 0, 150, b, b)
        assert_same(o[b], expected_o)
        assert_same(final[b], expected_final)


@pytest.mark.parametrize("gate", ["softplus", "harsh"])
def test_reference_is_the_definition_of_a_ragged_batch(gate: str) -> None:
    inputs, y = exact_inputs(160, gate, H=2, K=16, V=24, cu_seqlens=RAGGED)
    o, final = kda_ops.chunk_kda(**inputs)
    for n, (start, end) in enumerate(itertools.pairwise(RAGGED)):
        expected_o, expected_final = step_by_step(inputs, y, start, end, 0, n)
        if end > start:
            assert_same(o[0, start:end], expected_o)
        assert_same(final[n], expected_final)
    assert not o[0, RAGGED[-1] :].any()


@pytest.mark.parametrize("cuts", [[64, 128], [1, 65, 100], [63, 64, 70]], ids=str)
def test_pieces_are_the_whole(cuts: list[int]) -> None:
    """Each piece continues from the previous one's state; its G restarts."""
    inputs, y = exact_inputs(200, K=16, V=24)
    whole, final = kda_ops.chunk_kda(**inputs)
    S, parts = inputs["initial_state"], []
    for start, end in zip([0, *cuts], [*cuts, 200], strict=True):
        piece = {name: inputs[name][:, start:end] for name in TOKENS}
        piece["g_cumsum"] = cumulative(y[:, start:end])
        o, S = kda_ops.chunk_kda(**piece, initial_state=S, output_final_state=True)
        parts.append(o)
    assert_same(torch.cat(parts, 1), whole)
    assert_same(S, final)


def test_scale() -> None:
    inputs, _ = exact_inputs(70, K=16, V=16)
    o, _ = kda_ops.chunk_kda(**inputs)
    scaled, _ = kda_ops.chunk_kda(**inputs, scale=16**-0.5 * 3)
    assert_same(scaled, 3 * o)


def test_without_a_state_it_starts_from_zeros() -> None:
    inputs, _ = exact_inputs(70, K=16, V=16)
    initial = inputs.pop("initial_state")
    o, final = kda_ops.chunk_kda(**inputs)
    zeros_o, zeros_final = kda_ops.chunk_kda(**inputs, initial_state=torch.zeros_like(initial))
    assert torch.equal(o, zeros_o)
    assert torch.equal(final, zeros_final)
    assert kda_ops.chunk_kda(**inputs | {"output_final_state": False})[1] is None


def test_gradients_against_finite_differences() -> None:
    inputs, _ = exact_inputs(67, "slow", H=1, HV=2, K=3, V=2)
    names = [*TOKENS, "initial_state"]
    values = [inputs[name].contiguous().requires_grad_() for name in names]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return kda_ops.chunk_kda(**dict(zip(names, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_gradients_of_a_harsh_gate_are_finite() -> None:
    inputs, _ = exact_inputs(130, "harsh", K=16, V=16, cu_seqlens=[0, 70, 120])
    values = {name: inputs[name].requires_grad_() for name in TOKENS}
    o, _ = kda_ops.chunk_kda(**inputs)
    o.sum().backward()
    for name, x in values.items():
        assert x.grad[:, :120].isfinite().all(), name
        assert x.grad[:, :120].any(), name
        assert not x.grad[:, 120:].any(), f"{name}: a padding row has a gradient"


def assert_sequences_are_separate(function: Any, pages: bool, **sizes: Any) -> None:
    torch.manual_seed(0)
    inputs = chunk_kda_inputs(CPU, T=150, cu_seqlens=[0, 40, 110, 140], **sizes)
    inputs = with_pages(inputs, [1, 2, 3], [0]) if pages else with_states(inputs)
    spoiled = copy_inputs(inputs)
    for name in TOKENS:
        spoiled[name][:, 40:110] = torch.nan
    clean_o, clean_final = function(**inputs)
    o, final = function(**spoiled)
    if pages:
        clean_final, final = inputs["state"][1:4], spoiled["state"][1:4]
    for rows in (slice(0, 40), slice(110, 150)):
        assert torch.equal(o[:, rows], clean_o[:, rows])
    assert torch.equal(final[::2], clean_final[::2])
    assert o[:, 40:110].isnan().all()


@pytest.mark.parametrize("pages", [False, True], ids=["functional", "paged"])
def test_sequences_are_separate(pages: bool) -> None:
    assert_sequences_are_separate(kda_ops.chunk_kda, pages, K=16, V=16)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a column
@pytest.mark.parametrize(
    "sizes", [{}, {"K": 48, "V": 16}, {"dtype": torch.float16}, {"dtype": torch.float32}], ids=str
)
def test_sequences_are_separate_in_kernels(sizes: dict[str, Any]) -> None:
    sizes = {"K": 64, "V": 64, **sizes}
    assert_sequences_are_separate(run_kernels(kda_ops.chunk_kda), True, **sizes)


def test_pages_are_the_functional_form() -> None:
    torch.manual_seed(0)
    plain = chunk_kda_inputs(CPU, T=160, H=2, K=16, V=24, cu_seqlens=RAGGED)
    slots, fresh = [2, 3, 0, 7, 1, 5], [0, 4]
    inputs = with_pages(plain, slots, fresh)
    before = inputs["state"].clone()
    initial = before[slots]
    initial[[*fresh, 2]] = 0
    expected_o, expected_final = kda_ops.chunk_kda(
        **plain, initial_state=initial, output_final_state=True
    )
    o, final = kda_ops.chunk_kda(**inputs)
    assert final is None
    expected_o[:, RAGGED[2] : RAGGED[3]] = 0  # the null block's sequence
    assert torch.equal(o, expected_o)
    for n, slot in enumerate(slots):
        if slot:
            assert torch.equal(inputs["state"][slot], expected_final[n])
    for slot in set(range(len(before))) - set(slots) | {0}:
        assert torch.equal(inputs["state"][slot].nan_to_num(), before[slot].nan_to_num())


def test_no_flag_means_all_continue() -> None:
    torch.manual_seed(0)
    inputs = with_pages(chunk_kda_inputs(CPU, B=2, T=70, K=16, V=16), [1, 2], [])
    other = copy_inputs(inputs)
    other["has_initial_state"] = None
    assert torch.equal(kda_ops.chunk_kda(**inputs)[0], kda_ops.chunk_kda(**other)[0])
    assert torch.equal(inputs["state"][1:], other["state"][1:])


def test_a_given_chunk_table_equals_the_computed_one() -> None:
    torch.manual_seed(0)
    inputs = chunk_kda_inputs(CPU, T=160, K=16, V=24, cu_seqlens=RAGGED)
    o, _ = kda_ops.chunk_kda(**inputs)
    again, _ = kda_ops.chunk_kda(
        **inputs, chunk_indices=prepare_chunk_indices(inputs["cu_seqlens"], 160)
    )
    assert torch.equal(o, again)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [{}, {"K": 48, "V": 80}], ids=["fast", "general"])
@pytest.mark.parametrize("gate", ["softplus", "harsh", "slow", "bounded"])
def test_kernel_error_is_below_the_baselines(gate: str, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    inputs = with_states(chunk_kda_inputs(CPU, T=150, gate=gate, **sizes))
    expected = kda_ops.chunk_kda(**copy_inputs(inputs, FP64))
    for out, exact in zip(run_kernels(kda_ops.chunk_kda)(**inputs), expected, strict=True):
        assert relative_error(out, exact) <= FROBENIUS


@pytest.mark.interpreter
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_a_gpu_with_much_shared_memory(dtype: torch.dtype, K: int) -> None:
    torch.manual_seed(0)
    inputs = with_states(chunk_kda_inputs(CPU, T=150, K=K, dtype=dtype, cu_seqlens=[0, 70, 140]))
    expected = kda_ops.chunk_kda(**copy_inputs(inputs, FP64))
    with mock.patch.object(workspace, "shared_memory", return_value=227 << 10):
        result = run_kernels(kda_ops.chunk_kda)(**inputs)
    for out, exact in zip(result, expected, strict=True):
        assert relative_error(out, exact) <= FROBENIUS * torch.finfo(dtype).eps / 2**-7


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [{}, {"K": 24, "V": 16, "dtype": torch.float32}], ids=str)
def test_kernels_survive_any_offsets_slots_and_tables(sizes: dict[str, Any]) -> None:
    """Wrong values give some result, without a fault or a write outside the pages."""
    torch.manual_seed(0)
    inputs = with_pages(chunk_kda_inputs(CPU, T=100, cu_seqlens=[0, 60, 100], **sizes), [1, 2], [0])
    memory = inputs["state"]._base
    launch = run_kernels(kda_ops.chunk_kda)
    table = prepare_chunk_indices(inputs["cu_seqlens"], 100)
    wrong = [
        {"cu_seqlens": torch.tensor([-50, 2**31 - 1, -7], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([90, 10, 2**40])},
        {"chunk_indices": torch.full_like(table, 2**31 - 1)},
        {"chunk_indices": torch.full_like(table, -(2**31))},
        {"chunk_indices": table.flip(1)},
    ]
    for change in wrong:
        launch(**inputs | change)
    gaps = [memory[:, :16], memory[:, 16 + inputs["state"][0].numel() :]]
    before = [gap.clone() for gap in gaps]
    untouched = memory.clone()
    o, _ = launch(**inputs | {"state_indices": torch.tensor([-1, 4])})
    assert not o.any()
    assert torch.equal(memory.nan_to_num(), untouched.nan_to_num())
    launch(**inputs)
    for gap, old in zip(gaps, before, strict=True):
        assert torch.equal(gap.nan_to_num(), old.nan_to_num())


@pytest.mark.interpreter
def test_kernel_reads_strided_inputs_in_place() -> None:
    torch.manual_seed(0)
    packed = chunk_kda_inputs(CPU, B=2, T=70, H=2, K=64, V=64, packed=True)
    dense = {name: x.contiguous() for name, x in packed.items()}
    across = {name: x.transpose(-1, -2).contiguous().mT for name, x in dense.items()}
    across["beta"] = dense["beta"]
    launch = run_kernels(kda_ops.chunk_kda)
    expected, _ = launch(**dense)
    assert not packed["q"].is_contiguous()
    with mock.patch.object(Tensor, "contiguous", side_effect=AssertionError("a copy")):
        assert torch.equal(launch(**packed)[0], expected)
    assert torch.equal(launch(**across)[0], expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_launches_when_compiled_for_a_gpu(dynamic: bool) -> None:
    torch.manual_seed(0)
    inputs = with_pages(chunk_kda_inputs(CPU, T=170, cu_seqlens=[0, 70, 160]), [1, 2], [0])
    inputs["chunk_indices"] = prepare_chunk_indices(inputs["cu_seqlens"], 170)
    _, (code,) = cuda_code(
        lambda **x: kda_ops.chunk_kda(**x)[0], **copy_inputs(inputs), dynamic=dynamic
    )
    assert summary(code).launches == ["chunk_prepare_kernel", "chunk_scan_kernel"]
    assert not summary(code).externs
    inputs = with_states(chunk_kda_inputs(CPU, B=2, T=170))
    _, (code,) = cuda_code(kda_ops.chunk_kda, **inputs, dynamic=dynamic)
    assert summary(code).launches == ["chunk_prepare_kernel", "chunk_scan_kernel"]
    assert not summary(code).externs


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nvidia_launches_compile(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    """With the instructions and shared memory of a launch on that GPU."""
    kernels, shared = kernel_module(), shared_module()
    gpu = test_cubin.TARGETS[target]
    recorder = test_cubin.Recorder()
    inputs = with_states(chunk_kda_inputs(CPU, T=128, H=32, dtype=dtype, cu_seqlens=[0, 128]))
    with (
        mock.patch.object(kernels, "traceable", recorder),
        mock.patch.object(shared, "traceable", recorder),
        mock.patch.object(kernels, "is_nvidia", return_value=True),
        mock.patch.object(workspace, "shared_memory", return_value=gpu.shared),
        torch.no_grad(),
        RunKernels(),
    ):
        kda_ops.chunk_kda(**inputs)
    assert [launch.constants.get("PACKED") for launch in recorder.launches.values()] == [True, None]
    for launch in recorder.launches.values():
        test_cubin.assert_fits(launch, target, tmp_path)


def test_pipeline_stages_fit_shared_memory() -> None:
    depths = []
    for shared in (64 << 10, 99 << 10, 163 << 10, 227 << 10):
        with mock.patch.object(workspace, "shared_memory", return_value=shared):
            scan = workspace.stages(3 * 128 + 64, 128, 32, 2, CPU)
            first_pass = workspace.stages(2 * 128, 128, 64, 2, CPU)
        depths.append((scan, first_pass))
    assert depths == [(1, 1), (1, 2), (2, 3), (3, 3)]


def bad(message: str, **change: Any) -> Any:
    return pytest.param(change, message, id=re.sub(r"\W+", "-", message))


def good_inputs() -> dict[str, Any]:
    return chunk_kda_inputs(CPU, T=70, H=2, HV=4, K=16, V=24)


STATE = torch.zeros(3, 4, 24, 16)
SLOT = torch.tensor([1])
CU = torch.tensor([0, 30, 70])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad("q must have 4 dimensions, got shape (70, 2, 16)", q=torch.zeros(70, 2, 16)),
        bad("q must have dtype float16, bfloat16", q=torch.zeros(1, 70, 2, 16, dtype=torch.int32)),
        bad("k must have shape [1, 70, 2, 16], got (1, 70, 1, 16)", k=torch.zeros(1, 70, 1, 16)),
        bad("k must have dtype bfloat16, got float32", k=torch.zeros(1, 70, 2, 16)),
        bad("v must have dtype bfloat16, got float32", v=torch.zeros(1, 70, 4, 24)),
        bad("v must have shape [1, 70, 4, 24], got (1, 69, 4, 24)", v=torch.zeros(1, 69, 4, 24)),
        bad(
            "v must have a multiple of the 2 heads of q, got 3",
            v=torch.zeros(1, 70, 3, 24, dtype=torch.bfloat16),
        ),
        bad(
            "v must have a head dimension in [1, 256], got 300",
            v=torch.zeros(1, 70, 4, 300, dtype=torch.bfloat16),
        ),
        bad(
            "g_cumsum must have shape [1, 70, 4, 16], got (1, 70, 2, 16)",
            g_cumsum=torch.zeros(1, 70, 2, 16),
        ),
        bad(
            "g_cumsum must have dtype float32",
            g_cumsum=torch.zeros(1, 70, 4, 16, dtype=torch.bfloat16),
        ),
        bad("beta must have shape [1, 70, 4], got (1, 70, 2)", beta=torch.zeros(1, 70, 2)),
        bad("beta must have dtype", beta=torch.zeros(1, 70, 4, dtype=torch.int64)),
        bad("g_cumsum must be on meta", **{"q": None}),
        bad("cu_seqlens must have dtype int32, int64, got float32", cu_seqlens=torch.zeros(2)),
        bad(
            "chunk_indices must come with cu_seqlens",
            chunk_indices=torch.zeros(2, 2, dtype=torch.int32),
        ),
        bad(
            "chunk_indices must have shape [3, 2], got (2, 2)",
            cu_seqlens=CU,
            chunk_indices=torch.zeros(2, 2, dtype=torch.int32),
        ),
        bad("cu_seqlens must start at 0, got 1", cu_seqlens=torch.tensor([1, 70])),
        bad("cu_seqlens must not decrease", cu_seqlens=torch.tensor([0, 50, 40])),
        bad("cu_seqlens must end at or before 70 tokens", cu_seqlens=torch.tensor([0, 71])),
        bad(
            "chunk_indices must be the chunk table of cu_seqlens",
            cu_seqlens=CU,
            chunk_indices=torch.zeros(3, 2, dtype=torch.int32),
        ),
        bad(
            "initial_state must have shape [1, 4, 24, 16] in state_layout VK, got (1, 4, 16, 24)",
            initial_state=torch.zeros(1, 4, 16, 24),
        ),
        bad(
            "initial_state must have dtype bfloat16, float32, float64, got float16",
            initial_state=torch.zeros(1, 4, 24, 16, dtype=torch.float16),
        ),
        bad("state_indices must come with state", state_indices=SLOT),
        bad("has_initial_state must come with state", has_initial_state=SLOT.bool()),
        bad(
            "initial_state must be None with state",
            state=STATE,
            state_indices=SLOT,
            initial_state=STATE[:1],
        ),
        bad(
            "output_final_state must be False with state",
            state=STATE,
            state_indices=SLOT,
            output_final_state=True,
        ),
        bad("state must have 4 dimensions", state=STATE[0], state_indices=SLOT),
        bad(
            "state must have shape [3, 4, 24, 16] in state_layout VK, got (3, 4, 16, 24)",
            state=STATE.mT,
            state_indices=SLOT,
        ),
        bad(
            "state must have dtype bfloat16, float32, float64, got float16",
            state=STATE.half(),
            state_indices=SLOT,
        ),
        bad(
            "state_indices must have shape [1], got (2,)",
            state=STATE,
            state_indices=torch.tensor([1, 2]),
        ),
        bad("state_indices must have dtype int32, int64", state=STATE, state_indices=SLOT.float()),
        bad("state_indices must be below 3, got 3", state=STATE, state_indices=SLOT + 2),
        bad(
            "state_indices must not repeat, got 2 more than once",
            cu_seqlens=CU,
            state=STATE,
            state_indices=torch.tensor([2, 2]),
        ),
        bad(
            "has_initial_state must have dtype bool",
            state=STATE,
            state_indices=SLOT,
            has_initial_state=SLOT,
        ),
        bad(
            "has_initial_state must have shape [1], got (2,)",
            state=STATE,
            state_indices=SLOT,
            has_initial_state=torch.tensor([True, True]),
        ),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    inputs = good_inputs()
    if change == {"q": None}:
        change = {name: inputs[name].to("meta") for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.chunk_kda(**inputs | change)


def test_with_offsets_the_batch_is_one_row() -> None:
    inputs = chunk_kda_inputs(CPU, B=2, T=10, K=16, V=16)
    with pytest.raises(ValueError, match="q must have batch size 1 with cu_seqlens, got 2"):
        kda_ops.chunk_kda(**inputs, cu_seqlens=torch.tensor([0, 10]))


def test_chunk_size_is_that_of_the_gate() -> None:
    assert CHUNK == 64


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("K", "V"), list(itertools.product((64, 128), repeat=2)))
def test_one_token_leaves_the_right_state(K: int, V: int, compiled: bool) -> None:
    """T is a constant of the kernel then; see `tests.support.sass`."""
    inputs = chunk_kda_inputs(torch.device("cuda"), T=1, H=2, K=K, V=V)

    def call(**inputs: Any) -> Any:
        return kda_ops.chunk_kda(**inputs, output_final_state=True)

    results = (torch.compile(call, fullgraph=True, dynamic=False) if compiled else call)(**inputs)
    low, high = (call(**copy_inputs(inputs, dtype)) for dtype in (None, torch.float64))
    for result, reference, exact in zip(results, low, high, strict=True):
        assert_close(result, reference, exact, inputs["v"].dtype)
