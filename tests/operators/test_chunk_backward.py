"""The gradient kernels of chunked KDA against the reference in fp64."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops._cases import with_states
from tests.support.backward import (
    KernelCase,
    arguments,
    assert_gradients,
    differentiable,
    launch,
    launch_saving,
    output_gradients,
    reference,
)
from tests.support.bounds import within_tensors
from tests.support.oracle import assert_close, copy_inputs, poisoned

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = [0, 0, 1, 65, 65, 129, 150]


def with_bf16_states(inputs: dict[str, Any]) -> dict[str, Any]:
    return with_states(inputs, BF16)


def with_zero_betas(inputs: dict[str, Any]) -> dict[str, Any]:
    """Some are 0, some so small that their square underflows fp32."""
    beta = inputs["beta"].clone()
    beta[:, ::3] = 0
    beta[:, 1::3] *= 1e-25
    return inputs | {"beta": beta}


def gated(change: Any = None, final: bool = True, **options: Any) -> KernelCase:
    return KernelCase("chunk_kda_gated", options, change, final)


def plain(change: Any = None, final: bool = True, **options: Any) -> KernelCase:
    return KernelCase("chunk_kda", options, change, final)


def steady(rate: float, T: int) -> KernelCase:
    """Tokens decay by 2^rate, less or more by a third."""

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        G = inputs["g_cumsum"]
        y = rate * (1 + torch.rand_like(G) / 1.5 - 1 / 3)
        return inputs | {"g_cumsum": torch.cat([x.cumsum(1) for x in y.split(64, 1)], 1)}

    return plain(change, final=False, T=T, K=64, V=64)


SHORT = [0, 0, 1, 66, 80]  # nothing, one token, two chunks, one; then padding
# how the pairs of rows of a chunk meet: by levels, in two passes, in one
MEETINGS = {0: -8.0, 5: -4.0, 6: -0.5}
SMALL = {
    **{f"fast-{n}": steady(x, T=70) for n, x in MEETINGS.items()},
    "fast-harsh": plain(T=66, K=64, V=64, gate="harsh"),
    # without a rate: of 20 tokens its gradient's terms cancel but for a tenth
    "fast-bounded-beta2-grouped": gated(
        T=20,
        B=2,
        HV=2,
        K=64,
        V=64,
        gate="bounded",
        rate=False,
        norm=True,
        beta_scale=2.0,
        packed=True,
    ),
    "fast-ragged": gated(with_states, T=84, K=64, V=64, cu_seqlens=SHORT, norm=True),
    "fast-zero-betas": plain(with_zero_betas, T=66, K=64, V=64, final=False),
    "fast-T1": gated(T=1, K=64, V=64, norm=True),
    "fast-whole-chunk": gated(T=64, K=64, V=64, norm=True),
    "fast-rows-between": gated(T=40, B=3, H=2, K=64, V=64, norm=True),
    "fast-T0": gated(with_states, T=0, K=64, V=64, norm=True),
    "fast-no-sequences": gated(T=10, K=64, V=64, cu_seqlens=[0]),
    "fp32-ragged": plain(with_bf16_states, T=84, K=16, V=16, dtype=FP32, cu_seqlens=SHORT),
    "fp32-zero-betas": plain(with_zero_betas, T=66, K=16, V=16, dtype=FP32, gate="harsh"),
    "fp16-bounded-grouped": gated(T=20, HV=2, K=20, V=16, dtype=FP16, norm=True, gate="bounded"),
    "bf16-no-rate": gated(
        T=66, K=16, V=24, gate="bounded", rate=False, dt_bias=False, packed=True, final=False
    ),
    "fp32-T1": gated(T=1, K=16, V=16, dtype=FP32, norm=True),
}
LARGE = {
    "128": plain(T=300, H=2),
    "128-harsh": plain(T=200, gate="harsh"),
    "128-ragged": gated(with_states, T=170, H=2, cu_seqlens=RAGGED, norm=True),
    "128-grouped": gated(with_states, T=170, H=2, HV=4, cu_seqlens=RAGGED, norm=True),
    "128-norm": gated(T=300, H=4, norm=True),
    "128-bounded-batch": gated(T=170, B=2, H=2, gate="bounded", packed=True, final=False),
    "128-slow": gated(T=170, gate="slow", norm=True),
    "K64-V128": gated(T=170, H=2, K=64, V=128, norm=True),
    "K128-V64": plain(T=170, H=2, V=64),
    "fp16-128": gated(T=130, H=2, dtype=FP16, norm=True),
    "fp32-K256": plain(T=70, K=256, V=32, dtype=FP32),
    "fp32-V256": gated(T=70, K=40, V=256, dtype=FP32, norm=True),
}


def named(cases: dict[str, KernelCase]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@pytest.mark.interpreter
@named(SMALL)
def test_gradients_in_the_interpreter(case: KernelCase) -> None:
    with within_tensors():
        assert_gradients(case, CPU)


@pytest.mark.gpu
@named(SMALL | LARGE)
def test_gradients_on_the_gpu(case: KernelCase) -> None:
    assert_gradients(case, torch.device("cuda"))


@pytest.mark.interpreter
@pytest.mark.parametrize("level", MEETINGS)
def test_how_the_rows_of_a_chunk_meet(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = import_module("kda_ops.delta_rule.chunked.kernels.gradient")
    make, made = kernels.make_gradient_workspace, []

    def recorded(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(kernels, "make_gradient_workspace", recorded)
    inputs = arguments(steady(MEETINGS[level], T=64), CPU)
    launch("chunk_kda", inputs, output_gradients(inputs), differentiable(inputs))
    assert made[0].parts[0, 0, 65] == level


FAST = {name: case for name, case in SMALL.items() if name.startswith("fast")}


def assert_saving(case: KernelCase, device: torch.device) -> None:
    """A forward that saves is as good as one that does not; its gradient is the same to the bit,
    however often it is taken.
    """
    inputs = arguments(case, device)
    given, needs = output_gradients(inputs), differentiable(inputs)
    op = getattr(torch.ops.kda_ops, case.operator).default
    with poisoned():
        (o, final), saved = launch_saving(case.operator, inputs)
        expected = launch(case.operator, inputs, given, needs)
        found = [launch(case.operator, inputs, given, needs, saved) for _ in range(2)]
    low, high = (op(*copy_inputs(inputs, dtype).values()) for dtype in (None, torch.float64))
    for x, y, z in zip((o, final), low, high, strict=True):
        assert_close(x, y, z, inputs["v"].dtype)
    for results in found:
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.interpreter
@named(FAST)
def test_saving_in_the_interpreter(case: KernelCase) -> None:
    assert_saving(case, CPU)


@pytest.mark.gpu
@named(FAST | {name: case for name, case in LARGE.items() if "128" in name and "fp" not in name})
def test_saving_on_the_gpu(case: KernelCase) -> None:
    assert_saving(case, torch.device("cuda"))


def in_slabs(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Bounds the workspace; returns a list to which each call appends its number of slabs."""
    workspace = import_module("kda_ops.delta_rule.chunked.gradient_workspace")
    monkeypatch.setattr(workspace, "GRADIENT_BYTES", size)
    split = workspace.Batch.split
    counts: list[int] = []

    def counted(self: Any, rows: Any, count: int) -> Any:
        counts.append(count)
        return split(self, rows, count)

    monkeypatch.setattr(workspace.Batch, "split", counted)
    return counts


SLABS = {
    "fast": (gated(with_states, T=84, K=64, V=64, cu_seqlens=SHORT, norm=True), 170_000),
    "bf16-general": (gated(with_states, T=70, B=2, K=16, V=16), 140_000),
}


@pytest.mark.interpreter
@pytest.mark.parametrize(("case", "size"), SLABS.values(), ids=SLABS.keys())
def test_slabs(case: KernelCase, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks at a time: states and their gradients are passed from slab to slab."""
    counts = in_slabs(monkeypatch, size)
    assert_gradients(case, CPU)
    assert max(counts) >= 2


# sequences without a chunk, with fewer chunks than segments, and with more
PARTS = {
    "ragged": gated(with_states, T=340, K=64, V=64, cu_seqlens=[0, 0, 1, 131, 330], norm=True),
    "batch": plain(with_states, T=200, B=2, K=64, V=64),
    "K128-V64": gated(with_states, T=260, K=128, V=64, norm=True),
}


def assert_segments(
    case: KernelCase, segments: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scans in segments, of a gradient and of a forward that saves."""
    kernels = import_module("kda_ops.delta_rule.chunked.kernels.gradient")
    monkeypatch.setattr(kernels, "gradient_segments", lambda *_: segments)
    assert_gradients(case, device)
    assert_saving(case, device)


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "segments"), [("ragged", 4), ("batch", 2)])
def test_segments_in_the_interpreter(
    name: str, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_segments(PARTS[name], segments, CPU, monkeypatch)


@pytest.mark.gpu
@named(PARTS)
def test_segments_on_the_gpu(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_segments(case, 4, torch.device("cuda"), monkeypatch)


@pytest.mark.gpu
@named({"heads8": gated(T=3000, H=8, norm=True), "head1": plain(with_states, T=2100)})
def test_few_heads_on_the_gpu(case: KernelCase) -> None:
    """As many segments as fill the GPU."""
    assert_gradients(case, torch.device("cuda"))
    assert_saving(case, torch.device("cuda"))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [gated(T=20, K=64, V=64, norm=True), gated(T=20, K=16, V=16, dtype=FP32, norm=True)],
    ids=["fast", "general"],
)
def test_frozen_arguments_do_not_change_other_gradients(case: KernelCase) -> None:
    inputs = arguments(case, CPU)
    given, needs = output_gradients(inputs), differentiable(inputs)
    everything = iter(launch(case.operator, inputs, given, needs))
    all_found = {n: next(everything) for n, need in zip(inputs, needs, strict=True) if need}
    for chosen in (("k", "A_log"), ("v",), ("raw_gate", "raw_beta")):
        found = launch(case.operator, inputs, given, [n in chosen for n in inputs])
        assert len(found) == len(chosen)
        for name, x in zip([n for n in inputs if n in chosen], found, strict=True):
            assert torch.equal(x, all_found[name]), name


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [None, 170_000], ids=["whole", "slabs"])
def test_the_initial_state_alone_needs_two_kernels(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = arguments(SMALL["fast-ragged"], CPU)
    given, needs = output_gradients(inputs), differentiable(inputs)
    expected = launch("chunk_kda_gated", inputs, given, needs)[-1]
    kernels = import_module("kda_ops.delta_rule.chunked.kernels.gradient")
    for name in ("states_forward_kernel", "backward_tiles_kernel", "chunk_gradient_kernel"):
        monkeypatch.setattr(kernels, name, None)
    counts = [] if size is None else in_slabs(monkeypatch, size)
    alone = [name == "initial_state" for name in inputs]
    (found,) = launch("chunk_kda_gated", inputs, given, alone)
    assert torch.equal(found, expected)
    assert size is None or max(counts) >= 2


@pytest.mark.interpreter
def test_a_sequence_in_pieces() -> None:
    """The gradient of the second piece's initial state is that of the first one's final state."""
    whole = arguments(plain(T=128, K=16, V=16, dtype=FP32), CPU)
    given, needs = output_gradients(whole), differentiable(whole)
    tokens = ("q", "k", "v", "g_cumsum", "beta")
    first, second = (
        whole | {n: whole[n][:, part] for n in tokens} for part in (slice(64), slice(64, None))
    )
    state = torch.ops.kda_ops.chunk_kda(*first.values())[1]
    second["initial_state"] = state
    do, dfinal = given
    assert do is not None
    *later, dstate = launch("chunk_kda", second, [do[:, 64:], dfinal], differentiable(second))
    earlier = launch("chunk_kda", first, [do[:, :64], dstate], needs)
    expected = reference("chunk_kda", whole, given, needs, torch.float64)
    low = reference("chunk_kda", whole, given, needs, None)
    for x, y, z, w in zip(earlier, later, low, expected, strict=True):
        assert_close(torch.cat([x, y], dim=1), z, w)


@pytest.mark.interpreter
def test_an_output_without_gradient() -> None:
    """The state's gradient alone."""
    case = plain(with_states, T=66, K=16, V=16)
    inputs = arguments(case, CPU)
    needs = differentiable(inputs)
    given: list[Tensor | None] = [None, output_gradients(inputs)[1]]
    found = launch(case.operator, inputs, given, needs)
    expected = reference(case.operator, inputs, given, needs, torch.float64)
    low = reference(case.operator, inputs, given, needs, None)
    for x, y, z in zip(found, low, expected, strict=True):
        assert_close(x, y, z, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [gated(T=1000, H=4, norm=True), plain(T=200, K=40, dtype=FP32)], ids=["fast", "general"]
)
def test_results_are_bitwise_reproducible(case: KernelCase) -> None:
    inputs = arguments(case, torch.device("cuda"))
    given, needs = output_gradients(inputs), differentiable(inputs)
    runs = [launch(case.operator, inputs, given, needs) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)
