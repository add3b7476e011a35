"""The C++ kernels of compiled CPU graphs, against fp64 and in the place of the references.

Most tests call them without compiling a graph: `run_native` is what `call_operator` lowers to.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kda_ops
from kda_ops import native
from kda_ops._cases import Case, with_pages, with_states
from kda_ops._numerics import RCP_LN2
from kda_ops.cache.batch import KDABatch
from kda_ops.conv.short_conv.cases import short_conv_inputs
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs, cumulative
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.nn.layer import KimiDeltaAttention
from tests.support.fake_cuda import summary
from tests.support.operators import cases, public_function
from tests.support.oracle import assert_accurate, copy_inputs, tensors

CPU = torch.device("cpu")
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = sorted({op._schema.name.split("::")[1] for op in native.NATIVE})
seeds = pytest.mark.parametrize("seed", range(8))


class RunNative(TorchDispatchMode):
    """Calls the native kernel of every operator that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in native.NATIVE:
            self.called.append(func.name())
        return native.NATIVE.get(func, func)(*args, **(kwargs or {}))


def run_native(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(**inputs: Any) -> Any:
        with torch.no_grad(), RunNative() as mode:
            result = function(**inputs)
        assert mode.called, "no native kernel was called"
        return result

    return run


def hold(name: str, inputs: dict[str, Any], mutated: tuple[str, ...], dtype: torch.dtype) -> None:
    """The kernel of an operator on these inputs against fp64."""
    case = Case(name=name, make=lambda _: inputs, mutated=mutated, operand_dtype=dtype)
    assert_accurate(run_native(public_function(name)), public_function(name), case)


def test_these_operators_have_a_native_kernel() -> None:
    assert NAMES == [
        "chunk_kda", "chunk_kda_gated", "chunk_kda_gated_affine", "kda_decode", "short_conv",
        "short_conv_qkv",
    ]  # fmt: skip
    for op, own in native.NATIVE.items():
        assert own.name() == op.name().replace("::", "::native_")


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, id=f"{n}-{c.name}") for n in NAMES for c in cases(n)],
)
def test_accurate(name: str, case: Case) -> None:
    """Ragged and empty sequences, null and padded pages, both layouts, all dtypes; what a kernel
    does not write is NaN.
    """
    assert_accurate(run_native(public_function(name)), public_function(name), case)


def lengths(draw: random.Random, count: int, most: int) -> list[int]:
    return [draw.choice([0, 1, draw.randint(2, 17), draw.randint(18, most)]) for _ in range(count)]


def offsets(parts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(parts)]


def slots_of(draw: random.Random, count: int) -> list[int]:
    """Distinct slots, some of them the null block."""
    return [slot * draw.choice([0, 1, 1, 1]) for slot in draw.sample(range(1, count + 3), count)]


@seeds
@pytest.mark.parametrize("gated", [False, True], ids=["chunk", "gated"])
def test_chunks_of_any_shape(gated: bool, seed: int) -> None:
    draw = random.Random(seed)
    parts = lengths(draw, draw.randint(1, 5), 150)
    H, dtype = draw.randint(1, 3), draw.choice([FP16, BF16, FP32, FP32])
    options: dict[str, Any] = {
        "T": sum(parts) + draw.choice([0, 0, 5]),  # rows behind the sequences hold NaN
        "H": H,
        "HV": H * draw.choice([1, 1, 2]),
        "K": draw.randint(1, 130),
        "V": draw.randint(1, 130),
        "dtype": dtype,
        "gate": draw.choice(["softplus", "harsh", "slow", "bounded"]),
        "cu_seqlens": offsets(parts),
        "packed": draw.choice([False, True]),
    }
    make = chunk_kda_inputs
    if gated:
        make = chunk_kda_gated_inputs
        options |= {"norm": draw.choice([False, True]), "beta_scale": draw.choice([1.0, 2.0])}
    inputs = make(CPU, **options)
    mutated: tuple[str, ...] = ()
    if draw.random() < 0.5:
        inputs, mutated = with_pages(inputs, slots_of(draw, len(parts)), [0]), ("state",)
    elif draw.random() < 0.7:
        inputs = with_states(inputs, draw.choice([FP32, BF16]))
    hold("chunk_kda_gated" if gated else "chunk_kda", inputs, mutated, dtype)


@pytest.mark.parametrize("kinds", [(-60.0,), (0.0,), (-60.0, 0.0), (-60.0, -1e-6, 0.0, -3.0)])
def test_chunks_forget_everything_and_nothing(kinds: tuple[float, ...]) -> None:
    """Gates of e^-60 a token, and of 1, in any order: no decay is a quotient."""
    inputs = chunk_kda_inputs(CPU, T=200, H=2, K=48, V=40, dtype=FP32)
    g = torch.tensor(kinds)[torch.randint(len(kinds), (1, 200, 2, 48))]
    inputs["g_cumsum"] = cumulative(RCP_LN2 * g)
    hold("chunk_kda", with_states(inputs), (), FP32)


@seeds
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_decode_of_any_shape(layout: str, seed: int) -> None:
    draw = random.Random(seed)
    N, H, num_spec = draw.randint(1, 5), draw.randint(1, 3), draw.choice([None, 1, 3])
    dtype, W = draw.choice([FP16, BF16, FP32, FP32]), draw.randint(2, 5)
    several = draw.choice([False, True])
    options: dict[str, Any] = {
        "W": W,
        "bias": draw.choice([False, True]),
        "activation": draw.choice(["silu", None]),
        "bounded": draw.choice([False, True]),
        "harsh": draw.choice([False, True]),
        "beta_scale": draw.choice([1.0, 2.0]),
        "conv_dtype": draw.choice([None, FP32, BF16, FP16]),
        "state_dtype": draw.choice([FP32, FP32, BF16]),
        "null": (0,) if N > 1 and draw.choice([False, True]) else (),
        "strided": draw.choice([False, True]),
        "index_dtype": draw.choice([torch.int32, torch.int64]),
        "unpack": draw.choice([False, True]),
        "num_spec": num_spec,
    }
    if several:
        most = 1 if num_spec is None else 1 + num_spec
        options["lengths"] = tuple(draw.randint(0, most) for _ in range(N))
        options["padding_rows"] = draw.choice([0, 2])
    if num_spec is not None:
        options["accepted"] = tuple(draw.randint(1, 1 + num_spec) for _ in range(N))
    K, V = draw.choice([16, 64, draw.randint(1, 130)]), draw.choice([16, draw.randint(1, 130)])
    HV = H * draw.choice([1, 1, 2])
    inputs = kda_decode_inputs(N, H, HV, K, V, layout, dtype, **options, device=CPU)
    hold("kda_decode", inputs, ("conv_state", "state"), dtype)


@seeds
@pytest.mark.parametrize("layout", [None, "SD", "DS"])
@pytest.mark.parametrize("name", ["short_conv", "short_conv_qkv"])
def test_convolutions_of_any_shape(name: str, layout: str | None, seed: int) -> None:
    draw = random.Random(seed)
    parts = lengths(draw, draw.randint(1, 4), 140)
    dtype = draw.choice([FP16, BF16, FP32, FP32])
    options: dict[str, Any] = {
        "W": draw.randint(2, 6),
        "bias": draw.choice([False, True]),
        "activation": draw.choice(["silu", None]),
        "strided": draw.choice([False, True]),
        "lengths": tuple(parts),
        "index_dtype": draw.choice([torch.int32, torch.int64]),
    }
    if layout is not None:
        options |= {
            "layout": layout,
            "state_indices": tuple(slots_of(draw, len(parts))),
            "initial": draw.choice([None, tuple(draw.randint(0, 1) for _ in parts)]),
            "num_spec": draw.choice([0, 2]),
            "state_dtype": draw.choice([None, FP32, BF16]),
        }
    T = sum(parts) + draw.choice([0, 3])
    if name == "short_conv":
        inputs = short_conv_inputs((T, draw.randint(1, 200)), dtype=dtype, **options, device=CPU)
    else:
        sizes = (draw.randint(1, 3), draw.randint(1, 130), draw.randint(1, 100))
        options["unpack"] = draw.choice([False, True])
        inputs = short_conv_qkv_inputs(1, T, *sizes, dtype, **options, device=CPU)
    hold(name, inputs, () if layout is None else ("conv_state",), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    threads = torch.get_num_threads()
    case = max(cases(name, kernels=True), key=lambda c: len(c.mutated))
    inputs = case.make(CPU)
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            own = copy_inputs(inputs)
            out = tensors(run_native(public_function(name))(**own))
            results.append([*out, *tensors([own[n] for n in case.mutated])])
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


REFUSED: dict[str, dict[str, Any]] = {
    "slot outside": {"state_indices": [[9, 2], [3, 4]]},
    "slot outside the states in a later column": {"state_indices": [[1, 9], [3, 4]]},
    "shared slot": {"state_indices": [[1, 2], [3, 1]]},
    "nothing accepted": {"num_accepted": [0, 1]},
    "too much accepted": {"num_accepted": [1, 3]},
    "offsets that fall": {"cu_seqlens": [0, 2, 1]},
    "offsets past the tokens": {"cu_seqlens": [0, 2, 9]},
    "first offset": {"cu_seqlens": [1, 2, 3]},
    "too many tokens": {"cu_seqlens": [0, 3, 4]},
}


def speculative(layout: str = "SD") -> dict[str, Any]:
    sizes = (2, 1, 1, 16, 16, layout, FP32)
    options: dict[str, Any] = {"lengths": (2, 2), "num_spec": 1, "accepted": (2, 1)}
    inputs = kda_decode_inputs(*sizes, **options, device=CPU)
    inputs["state_indices"] = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    return inputs


def outcome(function: Callable[..., Any], inputs: dict[str, Any]) -> str | None:
    """The error of a call; one that fails has written nothing."""
    before = {name: inputs[name].clone() for name in ("conv_state", "state")}
    try:
        function(**inputs)
    except ValueError as error:
        for name, x in before.items():
            assert torch.equal(inputs[name].nan_to_num(), x.nan_to_num())
        return str(error)
    return None


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_decode_refuses_what_the_operator_refuses(changes: dict[str, Any]) -> None:
    inputs = speculative() | {n: torch.tensor(x, dtype=torch.int32) for n, x in changes.items()}
    error = outcome(run_native(kda_ops.fused.kda_decode), inputs)
    assert error is not None
    assert error == outcome(kda_ops.fused.kda_decode, inputs)


def test_decode_and_the_operator_agree_on_any_tables() -> None:
    """The kernel's own look at tables refuses no more and no less than the operator's check."""
    draw = random.Random(0)
    inputs = speculative()
    slots = len(inputs["state"])
    verdicts = []
    for _ in range(300):
        table = draw.sample(range(slots), 4)
        if draw.random() < 0.3:
            table[draw.randrange(4)] = draw.choice([-1, 0, slots, *table])
        rows = [table[:2], table[2:]]
        ends = [draw.randint(0, 2), draw.randint(2, 4)]
        ends = ends[::-1] if draw.random() < 0.1 else ends
        accepted = [draw.choice([0, 1, 1, 1, 2, 2, 2, 3]) for _ in range(2)]
        values = {"state_indices": rows, "cu_seqlens": [0, *ends], "num_accepted": accepted}
        given = copy_inputs(inputs) | {n: torch.tensor(x) for n, x in values.items()}
        other = copy_inputs(given)
        error = outcome(run_native(kda_ops.fused.kda_decode), given)
        assert error == outcome(kda_ops.fused.kda_decode, other)
        verdicts.append(error is None)
    assert 50 < sum(verdicts) < 250


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda_gated", "short_conv", "short_conv_qkv"])
def test_the_others_refuse_bad_offsets(name: str) -> None:
    case = next(c for c in cases(name) if "ragged" in c.name)
    inputs = case.make(CPU)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].flip(0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        run_native(public_function(name))(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_fp64_is_the_reference(name: str) -> None:
    case = max(cases(name, kernels=True), key=lambda c: len(c.mutated))
    own = copy_inputs(case.make(CPU), FP64)
    other = copy_inputs(own)
    out = tensors(run_native(public_function(name))(**own))
    for x, y in zip(out, tensors(public_function(name)(**other)), strict=True):
        assert torch.equal(x, y)
    for n in case.mutated:
        for x, y in zip(tensors(own[n]), tensors(other[n]), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def layer() -> KimiDeltaAttention:
    return KimiDeltaAttention(64, 32, 2).eval()


def batches(module: KimiDeltaAttention) -> dict[str, dict[str, Any]]:
    """Arguments of a layer without a state, in a prefill of pages and in a decode step."""
    state = module.state_spec().allocate(4)
    prefill = KDABatch.prefill([5, 70], [1, 3], has_initial_state=[False, True])
    decode = KDABatch.decode([2, 3])
    return {
        "whole": {"hidden_states": torch.randn(2, 70, 64)},
        "prefill": {"hidden_states": torch.randn(1, 75, 64), "state": state, "batch": prefill},
        "decode": {"hidden_states": torch.randn(1, 2, 64), "state": state, "batch": decode},
    }


EXTERNS = {
    "whole": ["native_short_conv_qkv.default", "native_chunk_kda_gated.default"],
    "prefill": ["native_short_conv_qkv.state", "native_chunk_kda_gated.state"],
    "decode": ["native_kda_decode.default"],
}


@pytest.mark.parametrize("kind", EXTERNS)
def test_a_compiled_layer_calls_them(kind: str) -> None:
    from torch._inductor.utils import run_and_get_code

    module = layer()
    inputs = batches(module)[kind]
    with torch.no_grad():
        fast = torch.compile(module, fullgraph=True)
        _, (source,) = run_and_get_code(fast, **inputs)
    ours = [name for name in summary(source).externs if "kda_ops" in name]
    assert ours == [f"torch.ops.kda_ops.{name}" for name in EXTERNS[kind]]


@pytest.mark.parametrize(
    ("patched", "message"),
    [({"cpp.cxx": ("no-such-compiler",)}, "No working C\\+\\+ compiler"), ({}, "C\\+\\+ compile")],
    ids=["no-compiler", "compiler-that-fails"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, which `warns` raises again
def test_without_a_compiler_the_references_compute(
    patched: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph without generated C++ needs no compiler; it warns once and gives the same numbers."""
    from torch._inductor import config

    if not patched:
        monkeypatch.setattr(native, "source", lambda: "no C++")
    inputs = short_conv_inputs((1, 30, 16), dtype=FP32, device=CPU)
    fast = torch.compile(kda_ops.short_conv, fullgraph=True)
    native._library.cache_clear()
    native.compiles.cache_clear()
    try:
        with config.patch(patched), torch.no_grad():
            with pytest.warns(UserWarning, match=message):
                y = fast(**inputs)
            again = fast(**inputs)
    finally:
        native._library.cache_clear()
        native.compiles.cache_clear()
    expected = kda_ops.short_conv(**inputs)
    assert torch.equal(y, expected)
    assert torch.equal(again, expected)
