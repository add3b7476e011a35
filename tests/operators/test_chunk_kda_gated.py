"""`chunk_kda_gated` beyond the common cases: definition, composition, gradients, padding,
errors.
"""

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
from kda_ops._cases import with_pages, with_states
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.varlen import prepare_chunk_indices
from tests.operators import test_cubin
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import RunKernels, run_kernels
from tests.support.oracle import copy_inputs

CPU = torch.device("cpu")
FP64 = torch.float64
TOKENS = ("q", "k", "v", "raw_gate", "raw_beta")
FROBENIUS = 0.005  # the best baseline's error in bf16
RAGGED = [0, 0, 1, 66, 66, 130, 150]


def exact_inputs(T: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    inputs = with_states(chunk_kda_gated_inputs(CPU, T=T, **options))
    return copy_inputs(inputs, FP64)


def kernel_module() -> Any:
    """Looked up by name: `kda_ops.fused.chunk_kda_gated` is the function."""
    return importlib.import_module("kda_ops.delta_rule.chunked.kernels.prepare_gated")


def step_by_step(inputs: dict[str, Any], start: int, end: int, b: int, n: int) -> Any:
    """The definition, token by token: outputs `[tokens, HV, V]` and final state `[HV, V, K]`."""
    q, k, v, x, beta = (inputs[name][b, start:end] for name in TOKENS)
    (H, K), HV = q.shape[1:], v.shape[1]
    o, states = torch.zeros_like(v), []
    for h in range(HV):
        S, key = inputs["initial_state"][n, h].T, h // (HV // H)
        rate = 1.0 if inputs["A_log"] is None else inputs["A_log"][h].exp()
        for t in range(end - start):
            z = x[t, h] if inputs["dt_bias"] is None else x[t, h] + inputs["dt_bias"][h]
            if inputs["lower_bound"] is None:
                g = -rate * torch.log1p(torch.exp(z))
            else:
                g = inputs["lower_bound"] / (1 + torch.exp(-rate * z))
            q_t, k_t = q[t, key], k[t, key]
            if inputs["qk_norm_eps"] is not None:
                q_t, k_t = (y / (y @ y + inputs["qk_norm_eps"]).sqrt() for y in (q_t, k_t))
            S = torch.diag(torch.exp(g)) @ S
            b_t = inputs["beta_scale"] / (1 + torch.exp(-beta[t, h]))
            S = S + b_t * torch.outer(k_t, v[t, h] - S.T @ k_t)
            o[t, h] = K**-0.5 * (S.T @ q_t)
        states.append(S.T)
    return o, torch.stack(states)


def composed(inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The same through the small operators."""
    rest = dict(inputs)
    q, k, x, beta = (rest.pop(name) for name in ("q", "k", "raw_gate", "raw_beta"))
    gate = {name: rest.pop(name) for name in ("A_log", "dt_bias", "lower_bound")}
    beta_scale, eps = rest.pop("beta_scale"), rest.pop("qk_norm_eps")
    if eps is not None:
        q, k = kda_ops.l2norm(q, eps=eps), kda_ops.l2norm(k, eps=eps)
    G = kda_ops.gate_cumsum(x, **gate, cu_seqlens=rest.get("cu_seqlens"))
    return kda_ops.chunk_kda(q, k, g_cumsum=G, beta=beta_scale * beta.sigmoid(), **rest)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding in fp64 sums over a sequence, with gates that reach thousands in a chunk
    (`harsh`).
    """
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 4096 * torch.finfo(FP64).eps * b.abs().max()


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


GATES = ["softplus", "harsh", "slow", "bounded"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_reference_is_the_definition(gate: str, norm: bool) -> None:
    inputs = exact_inputs(
        100, B=2, H=2, HV=4, K=24, V=40, gate=gate, norm=norm, beta_scale=1.0 + norm
    )
    o, final = kda_ops.fused.chunk_kda_gated(**inputs)
    for b in range(2):
        expected_o, expected_final = step_by_step(inputs, 0, 100, b, b)
        assert_same(o[b], expected_o)
        assert_same(final[b], expected_final)


def test_reference_is_the_definition_of_a_ragged_batch() -> None:
    inputs = exact_inputs(160, H=2, K=16, V=24, norm=True, cu_seqlens=RAGGED)
    o, final = kda_ops.fused.chunk_kda_gated(**inputs)
    for n, (start, end) in enumerate(itertools.pairwise(RAGGED)):
        expected_o, expected_final = step_by_step(inputs, start, end, 0, n)
        if end > start:
            assert_same(o[0, start:end], expected_o)
        assert_same(final[n], expected_final)
    assert not o[0, RAGGED[-1] :].any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_it_is_the_composition(gate: str, norm: bool) -> None:
    inputs = exact_inputs(160, K=16, V=24, gate=gate, norm=norm, beta_scale=2.0, cu_seqlens=RAGGED)
    o, final = kda_ops.fused.chunk_kda_gated(**inputs)
    expected_o, expected_final = composed(inputs)
    assert_same(o, expected_o)
    assert_same(final, expected_final)


def test_pages_are_the_functional_form() -> None:
    torch.manual_seed(0)
    plain = chunk_kda_gated_inputs(CPU, T=160, H=2, K=16, V=24, norm=True, cu_seqlens=RAGGED)
    slots, fresh = [2, 3, 0, 7, 1, 5], [0, 4]
    inputs = with_pages(plain, slots, fresh)
    before = inputs["state"].clone()
    initial = before[slots]
    initial[[*fresh, 2]] = 0
    expected_o, expected_final = kda_ops.fused.chunk_kda_gated(
        **plain, initial_state=initial, output_final_state=True
    )
    o, final = kda_ops.fused.chunk_kda_gated(**inputs)
    assert final is None
    expected_o[:, RAGGED[2] : RAGGED[3]] = 0  # the null block's sequence
    assert torch.equal(o, expected_o)
    for n, slot in enumerate(slots):
        if slot:
            assert torch.equal(inputs["state"][slot], expected_final[n])
    for slot in set(range(len(before))) - set(slots) | {0}:
        assert torch.equal(inputs["state"][slot].nan_to_num(), before[slot].nan_to_num())


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gradients_against_finite_differences(norm: bool) -> None:
    inputs = exact_inputs(67, H=1, HV=2, K=3, V=2, gate="slow", norm=norm)
    names = [*TOKENS, "A_log", "dt_bias", "initial_state"]
    values = [inputs.pop(name).contiguous().requires_grad_() for name in names]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return kda_ops.fused.chunk_kda_gated(**dict(zip(names, values, strict=True)), **inputs)

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("gate", ["harsh", "bounded"])
def test_gradients_are_finite_and_leave_padding_alone(gate: str) -> None:
    inputs = exact_inputs(130, K=16, V=16, gate=gate, norm=True, cu_seqlens=[0, 70, 120])
    values = {name: inputs[name].requires_grad_() for name in (*TOKENS, "A_log", "dt_bias")}
    o, _ = kda_ops.fused.chunk_kda_gated(**inputs)
    o.sum().backward()
    for name in TOKENS:
        gradient = values[name].grad
        assert gradient[:, :120].isfinite().all(), name
        assert gradient[:, :120].any(), name
        assert not gradient[:, 120:].any(), f"{name}: a padding row has a gradient"
    assert values["A_log"].grad.isfinite().all()
    assert values["dt_bias"].grad.isfinite().all()


def assert_sequences_are_separate(function: Any, bad: float, **sizes: Any) -> None:
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=150, norm=True, cu_seqlens=[0, 40, 110, 140], **sizes)
    inputs = with_pages(inputs, [1, 2, 3], [0])
    spoiled = copy_inputs(inputs)
    for name in TOKENS:
        spoiled[name][:, 40:110] = bad
    clean_o, _ = function(**inputs)
    o, _ = function(**spoiled)
    for rows in (slice(0, 40), slice(110, 150)):
        assert torch.equal(o[:, rows], clean_o[:, rows])
    for slot in (1, 3):
        assert torch.equal(spoiled["state"][slot], inputs["state"][slot])
    assert not o[:, 40:110].isfinite().any()


def test_sequences_are_separate() -> None:
    assert_sequences_are_separate(kda_ops.fused.chunk_kda_gated, torch.nan, K=16, V=16)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a column
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes", [{}, {"K": 48, "V": 16}, {"dtype": torch.float32}], ids=str)
def test_sequences_are_separate_in_kernels(sizes: dict[str, Any], bad: float) -> None:
    sizes = {"K": 64, "V": 64, **sizes}
    assert_sequences_are_separate(run_kernels(kda_ops.fused.chunk_kda_gated), bad, **sizes)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [{}, {"K": 48, "V": 80}], ids=["fast", "general"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_kernel_error_is_below_the_baselines(gate: str, sizes: dict[str, int], norm: bool) -> None:
    torch.manual_seed(0)
    inputs = with_states(chunk_kda_gated_inputs(CPU, T=150, gate=gate, norm=norm, **sizes))
    expected = composed(copy_inputs(inputs, FP64))
    for out, exact in zip(
        run_kernels(kda_ops.fused.chunk_kda_gated)(**inputs), expected, strict=True
    ):
        assert relative_error(out, exact) <= FROBENIUS


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1e6, 1e-3])
def test_norms_are_applied_before_fp16(size: float) -> None:
    """Raw q and k may overflow fp16, or be subnormal in it."""
    torch.manual_seed(0)
    inputs = with_states(chunk_kda_gated_inputs(CPU, T=130, norm=True))
    inputs |= {name: inputs[name] * size for name in ("q", "k")}
    expected = kda_ops.fused.chunk_kda_gated(**copy_inputs(inputs, FP64))
    for out, exact in zip(
        run_kernels(kda_ops.fused.chunk_kda_gated)(**inputs), expected, strict=True
    ):
        assert relative_error(out, exact) <= FROBENIUS


@pytest.mark.interpreter
def test_a_token_that_forgets_everything() -> None:
    """An infinite gate input decays the state to zero and does not affect the other tokens."""
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=64, K=64, V=64)
    inputs["raw_gate"][:, 20] = torch.inf
    launch = run_kernels(kda_ops.fused.chunk_kda_gated)
    o, _ = launch(**inputs)
    tail = {name: y[:, 20:] if name in TOKENS else y for name, y in inputs.items()}
    expected, _ = launch(**tail)
    assert o.isfinite().all()
    assert relative_error(o[:, 20:], expected) <= FROBENIUS


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [{"V": 64}, {"K": 24, "V": 16, "dtype": torch.float32}], ids=str)
def test_kernels_survive_any_offsets_slots_and_tables(sizes: dict[str, Any]) -> None:
    """Wrong values give some result, without a fault or a write outside the pages."""
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=100, norm=True, cu_seqlens=[0, 60, 100], **sizes)
    inputs = with_pages(inputs, [1, 2], [0])
    memory = inputs["state"]._base
    gaps = [memory[:, :16], memory[:, 16 + inputs["state"][0].numel() :]]
    before = [gap.clone() for gap in gaps]
    launch = run_kernels(kda_ops.fused.chunk_kda_gated)
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
    for gap, old in zip(gaps, before, strict=True):
        assert torch.equal(gap.nan_to_num(), old.nan_to_num())
    untouched = memory.clone()
    o, _ = launch(**inputs | {"state_indices": torch.tensor([-1, 4])})
    assert not o.any()
    assert torch.equal(memory.nan_to_num(), untouched.nan_to_num())


@pytest.mark.interpreter
def test_kernel_reads_strided_inputs_in_place() -> None:
    torch.manual_seed(0)
    packed = chunk_kda_gated_inputs(CPU, B=2, T=70, H=2, K=64, V=64, packed=True, norm=True)
    dense = {name: y.contiguous() if isinstance(y, Tensor) else y for name, y in packed.items()}
    launch = run_kernels(kda_ops.fused.chunk_kda_gated)
    expected, _ = launch(**dense)
    assert not packed["raw_gate"].is_contiguous()
    assert torch.equal(launch(**packed)[0], expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_launches_when_compiled_for_a_gpu(dynamic: bool) -> None:
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=170, norm=True, cu_seqlens=[0, 70, 160])
    inputs = with_pages(inputs, [1, 2], [0])
    inputs["chunk_indices"] = prepare_chunk_indices(inputs["cu_seqlens"], 170)
    tensors = {name: y for name, y in inputs.items() if isinstance(y, Tensor)}
    rest = {name: y for name, y in inputs.items() if not isinstance(y, Tensor)}
    _, (code,) = cuda_code(
        lambda **x: kda_ops.fused.chunk_kda_gated(**x, **rest)[0],
        **copy_inputs(tensors),
        dynamic=dynamic,
    )
    assert summary(code).launches == ["chunk_gated_prepare_kernel", "chunk_scan_kernel"]
    assert not summary(code).externs


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nvidia_launch_compiles(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    """With the instructions of a launch on that GPU."""
    kernels = kernel_module()
    recorder = test_cubin.Recorder()
    inputs = chunk_kda_gated_inputs(CPU, T=128, H=2, norm=True, dtype=dtype, cu_seqlens=[0, 128])
    with (
        mock.patch.object(kernels, "traceable", recorder),
        mock.patch("kda_ops.delta_rule.chunked.launch.launch_scan"),
        mock.patch.object(kernels, "is_nvidia", return_value=True),
        torch.no_grad(),
        RunKernels(),
    ):
        kda_ops.fused.chunk_kda_gated(**inputs)
    (launch,) = recorder.launches.values()
    assert launch.constants["PACKED"]
    test_cubin.assert_fits(launch, target, tmp_path)


def bad(message: str, **change: Any) -> Any:
    return pytest.param(change, message, id=re.sub(r"\W+", "-", message))


STATE = torch.zeros(3, 4, 24, 16)
SLOT = torch.tensor([1])
CU = torch.tensor([0, 30, 70])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad("q must have 4 dimensions, got shape (70, 2, 16)", q=torch.zeros(70, 2, 16)),
        bad("k must have shape [1, 70, 2, 16], got (1, 70, 1, 16)", k=torch.zeros(1, 70, 1, 16)),
        bad("v must have dtype bfloat16, got float32", v=torch.zeros(1, 70, 4, 24)),
        bad(
            "raw_gate must have shape [1, 70, 4, 16], got (1, 69, 4, 16)",
            raw_gate=torch.zeros(1, 69, 4, 16),
        ),
        bad("raw_gate must have dtype", raw_gate=torch.zeros(1, 70, 4, 16, dtype=torch.int64)),
        bad("raw_beta must have shape [1, 70, 4], got (1, 70, 2)", raw_beta=torch.zeros(1, 70, 2)),
        bad("raw_beta must have dtype", raw_beta=torch.zeros(1, 70, 4, dtype=torch.int64)),
        bad("A_log must have shape [4] or [1, 1, 4, 1], got (2,)", A_log=torch.zeros(2)),
        bad("A_log must be given unless lower_bound is, got None", A_log=None),
        bad("dt_bias must have shape [4, 16] or [64], got (4,)", dt_bias=torch.zeros(4)),
        bad("lower_bound must be None or in [-5, 0), got 1.0", lower_bound=1.0),
        bad("beta_scale must be 1 or 2, got 3.0", beta_scale=3.0),
        bad("qk_norm_eps must not be negative, got -1.0", qk_norm_eps=-1.0),
        bad("raw_gate must be on meta like q, got cpu", **{"q": None}),
        bad("cu_seqlens must have dtype int32, int64, got float32", cu_seqlens=torch.zeros(2)),
        bad("cu_seqlens must not decrease", cu_seqlens=torch.tensor([0, 50, 40])),
        bad(
            "chunk_indices must come with cu_seqlens",
            chunk_indices=torch.zeros(2, 2, dtype=torch.int32),
        ),
        bad(
            "chunk_indices must be the chunk table of cu_seqlens",
            cu_seqlens=CU,
            chunk_indices=torch.zeros(3, 2, dtype=torch.int32),
        ),
        bad(
            "initial_state must have shape [1, 4, 24, 16] in state_layout VK, got (1, 4, 16, 24)",
            initial_state=torch.zeros(1, 4, 16, 24),
        ),
        bad("state_indices must come with state", state_indices=SLOT),
        bad("has_initial_state must come with state", has_initial_state=SLOT.bool()),
        bad(
            "output_final_state must be False with state",
            state=STATE,
            state_indices=SLOT,
            output_final_state=True,
        ),
        bad(
            "state must have dtype bfloat16, float32, float64, got float16",
            state=STATE.half(),
            state_indices=SLOT,
        ),
        bad("state_indices must be below 3, got 3", state=STATE, state_indices=SLOT + 2),
        bad(
            "state_indices must not repeat, got 2 more than once",
            cu_seqlens=CU,
            state=STATE,
            state_indices=torch.tensor([2, 2]),
        ),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    inputs = chunk_kda_gated_inputs(CPU, T=70, H=2, HV=4, K=16, V=24)
    if change == {"q": None}:
        change = {name: inputs[name].to("meta") for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.fused.chunk_kda_gated(**inputs | change)


def test_with_offsets_the_batch_is_one_row() -> None:
    inputs = chunk_kda_gated_inputs(CPU, B=2, T=10, K=16, V=16)
    with pytest.raises(ValueError, match="q must have batch size 1 with cu_seqlens, got 2"):
        kda_ops.fused.chunk_kda_gated(**inputs, cu_seqlens=torch.tensor([0, 10]))
