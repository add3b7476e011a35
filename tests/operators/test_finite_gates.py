"""No finite input gives NaN, in value or gradient: every operator with a gate, at the limits of
every dtype, where rates and gate inputs overflow and underflow. Gates that forget everything.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kda_ops
from kda_ops._cases import with_pages, with_states
from kda_ops._numerics import RCP_LN2
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.delta_rule.recurrent_kda.cases import recurrent_inputs
from kda_ops.gating.gate.reference import gate_reference
from kda_ops.tuning import override
from tests.support import generated
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import public_function, run_kernels
from tests.support.oracle import assert_close, copy_inputs, tensors

CPU = torch.device("cpu")
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOUNDS = [None, -5.0]
every_bound = pytest.mark.parametrize("lower_bound", BOUNDS, ids=["softplus", "bounded"])
every_dtype = pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=str)

RATES = (1e4, 1e3, 709.5, 176.0, 110.0, 89.0, 88.5, 88.0, 80.0, 45.0, 16.0, 3.0)
SIZES = (1e38, 1e30, 1e4, 1e3, 200.0, 110.0, 89.0, 20.0, 1.0, 1e-3, 1e-30)


def ends(sizes: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The finite numbers of these magnitudes, and those at the limits of the dtype."""
    finfo = torch.finfo(dtype)
    ends = (finfo.max, finfo.max / 2, finfo.tiny, finfo.smallest_normal * finfo.eps, 0.0)
    x = torch.tensor([*sizes, *ends], dtype=FP64).clamp(max=finfo.max)
    return torch.cat([x, -x]).to(dtype)


def gate_inputs(
    dtype: torch.dtype, parameters: torch.dtype, lower_bound: float | None
) -> dict[str, Any]:
    """Every combination of a gate input, a rate and a bias."""
    x, A_log, bias = ends(SIZES, dtype), ends(RATES, parameters), ends(SIZES, parameters)
    shape = (len(A_log), len(bias))
    return {
        "raw_gate": x[None, :, None, None].expand(1, len(x), *shape),
        "A_log": A_log,
        "dt_bias": bias.expand(shape),
        "lower_bound": lower_bound,
    }


def some(x: Tensor, *shape: int) -> Tensor:
    """Elements of x in random order."""
    return x[torch.randint(len(x), shape)]


def heads(K: int) -> dict[str, Tensor]:
    """Heads with the rates that matter, biases of every size."""
    largest = torch.finfo(FP32).max
    A_log = torch.tensor([largest, 89.0, 1.0, -88.0, -largest])
    return {"A_log": A_log, "dt_bias": some(ends(SIZES, FP32), len(A_log), K)}


def chunk_inputs(lower_bound: float | None, T: int = 20, **options: Any) -> dict[str, Any]:
    """Every other token has gate inputs of every size."""
    torch.manual_seed(0)
    inputs = chunk_kda_gated_inputs(CPU, T=T, HV=5, norm=True, **options)
    x = inputs["raw_gate"][:, 1::2]
    x.copy_(some(ends(SIZES, x.dtype), *x.shape))
    return with_states(inputs | heads(x.shape[3]) | {"lower_bound": lower_bound})


def decode_inputs(lower_bound: float | None) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = kda_decode_inputs(4, 1, 5, 32, 16, padding=0, device=CPU)
    inputs["state"][0], inputs["conv_state"][0] = 0, 0  # the null block, which is NaN
    f = some(ends(SIZES, BF16), *inputs["raw_gate"].shape)
    return inputs | heads(f.shape[3]) | {"raw_gate": f, "lower_bound": lower_bound}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.cuda() if isinstance(x, Tensor) else x for n, x in inputs.items()}


def assert_no_nan(results: Any) -> None:
    for x in tensors(results):
        assert not x.isnan().any()


def assert_finite(results: Any) -> None:
    for x in tensors(results):
        assert x.isfinite().all()


def assert_gradients_are_finite(function: Any, inputs: dict[str, Any]) -> None:
    """All gradients are finite, except large ones in fp16, as for any operator."""
    values = {
        n: x.detach().clone().requires_grad_()
        for n, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    generator = torch.Generator().manual_seed(0)
    results = tensors(function(**inputs | values))
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in results]
    gradients = torch.autograd.grad(results, list(values.values()), weights)
    for (name, x), gradient in zip(values.items(), gradients, strict=True):
        assert not gradient.isnan().any(), name
        assert x.dtype == FP16 or gradient.isfinite().all(), name


# ------------------------------------------------------------------------------------ the gate


def test_an_infinite_rate_times_zero() -> None:
    x = torch.full((1, 1, 1, 4), -110.0)
    assert not kda_ops.gate(x, torch.tensor([89.0])).any()


@every_bound
@every_dtype
@pytest.mark.parametrize("parameters", [BF16, FP32, FP64], ids=str)
def test_gate(dtype: torch.dtype, parameters: torch.dtype, lower_bound: float | None) -> None:
    inputs = gate_inputs(dtype, parameters, lower_bound)
    g = kda_ops.gate(**inputs)
    assert_no_nan(g)
    assert (g <= 0).all()
    assert_finite(kda_ops.gate_cumsum(**inputs))
    assert_gradients_are_finite(kda_ops.gate, inputs)
    assert_gradients_are_finite(kda_ops.gate_cumsum, inputs)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
mixed = st.one_of(finite, st.floats(-1e4, 1e4, width=32), st.floats(-150, 150, width=32))


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from([FP16, BF16, FP32, FP64]),
    x=st.lists(mixed, min_size=4, max_size=4),
    A_log=mixed,
    dt_bias=mixed,
    lower_bound=st.sampled_from(BOUNDS),
)
def test_gate_of_any_numbers(
    dtype: torch.dtype, x: list[float], A_log: float, dt_bias: float, lower_bound: float | None
) -> None:
    largest = torch.finfo(dtype).max
    inputs = {
        "raw_gate": torch.tensor(x, dtype=FP64).clamp(-largest, largest).to(dtype).view(1, 4, 1, 1),
        "A_log": torch.tensor([A_log]),
        "dt_bias": torch.tensor([dt_bias]),
        "lower_bound": lower_bound,
    }
    assert_no_nan(kda_ops.gate(**inputs))
    assert_finite(kda_ops.gate_cumsum(**inputs))
    assert_gradients_are_finite(kda_ops.gate, inputs)
    assert_gradients_are_finite(kda_ops.gate_cumsum, inputs)


@every_bound
def test_second_derivatives_of_the_reference(lower_bound: float | None) -> None:
    x = torch.randn(3, 2, 4, dtype=FP64, requires_grad=True)
    A_log = torch.randn(2, dtype=FP64, requires_grad=True)
    gate = lambda *args: gate_reference(*args, None, lower_bound)  # noqa: E731
    assert torch.autograd.gradgradcheck(gate, (x, A_log))


def test_gradients_of_the_tails() -> None:
    """Where nothing overflows, gradients are those of the formula."""
    x = torch.linspace(-90, 90, 181, dtype=FP64).view(-1, 1, 1)
    weight = torch.randn(x.shape, dtype=FP64)
    for A_log, lower_bound in [(-3.0, None), (3.0, None), (-3.0, -5.0), (0.5, -1.0)]:
        values = [x.clone().requires_grad_(), torch.tensor([A_log], dtype=FP64).requires_grad_()]
        z, a = values[0], values[1].exp()[:, None]
        plain = -a * torch.logaddexp(z, torch.zeros_like(z))
        if lower_bound is not None:
            plain = lower_bound * torch.sigmoid(a * z)
        g = kda_ops.gate(*values, lower_bound=lower_bound)
        for gradient, expected in zip(
            torch.autograd.grad(g, values, weight),
            torch.autograd.grad(plain, values, weight),
            strict=True,
        ):
            assert_close(gradient.float(), expected.float(), expected)


@every_bound
def test_gate_compiled(lower_bound: float | None) -> None:
    inputs = gate_inputs(FP32, FP32, lower_bound)
    g = torch.compile(kda_ops.gate, fullgraph=True)(**inputs)
    assert_no_nan(g)
    assert torch.equal(g.isinf(), kda_ops.gate(**inputs).isinf())
    assert_gradients_are_finite(torch.compile(kda_ops.gate, fullgraph=True), inputs)


def plain(raw_gate: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    g = -A_log.exp()[:, None] * torch.nn.functional.softplus(raw_gate.float() + dt_bias)
    return kda_ops.chunk_cumsum(g) * RCP_LN2


def test_plain_gates_are_rewritten_to_gates_without_nan() -> None:
    inputs = gate_inputs(FP32, FP32, None)
    del inputs["lower_bound"]
    assert plain(**inputs).isnan().any()
    assert_no_nan(torch.compile(plain, fullgraph=True)(**inputs))


@pytest.mark.interpreter
@every_bound
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["gate", "gate_cumsum"])
def test_gate_in_kernels(name: str, dtype: torch.dtype, lower_bound: float | None) -> None:
    inputs = gate_inputs(dtype, FP32, lower_bound)
    out = run_kernels(public_function(name))(**inputs)
    assert_no_nan(out)
    if name == "gate_cumsum":
        assert_finite(out)


@pytest.mark.interpreter
def test_gate_in_a_generated_scan() -> None:
    inputs = gate_inputs(BF16, FP32, None)
    fewer = {
        "raw_gate": inputs["raw_gate"][:, ::2, ::4],
        "A_log": inputs["A_log"][::4].contiguous(),
    }
    inputs |= fewer | {"dt_bias": inputs["dt_bias"][::4]}
    with override({"gate_cumsum.form": {"form": "scan"}}):
        G, (source,) = cuda_code(kda_ops.gate_cumsum, **inputs, load=generated.load)
    assert summary(source).launches[0].startswith("triton_")
    assert_finite(G)


@pytest.mark.gpu
@every_bound
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["gate", "gate_cumsum"])
def test_gate_on_the_gpu(
    name: str, compile: bool, dtype: torch.dtype, lower_bound: float | None
) -> None:
    inputs = on_gpu(gate_inputs(dtype, FP32, lower_bound))
    function = public_function(name)
    out = (torch.compile(function, fullgraph=True) if compile else function)(**inputs)
    assert_no_nan(out)
    if name == "gate_cumsum":
        assert_finite(out)


@pytest.mark.parametrize("name", ["gate", "gate_cumsum", "chunk_kda_gated"])
def test_nan_stays_nan(name: str) -> None:
    assert_nan_stays(public_function(name), name)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("name", ["gate", "gate_cumsum", "chunk_kda_gated"])
def test_nan_stays_nan_in_kernels(name: str) -> None:
    assert_nan_stays(run_kernels(public_function(name)), name)


def assert_nan_stays(function: Any, name: str) -> None:
    """The handling of finite inputs hides no NaN, in an input or a parameter."""
    for spoiled in ("raw_gate", "A_log", "dt_bias"):
        for dtype in (BF16, FP32):
            inputs = chunk_kda_gated_inputs(CPU, T=8, K=64, V=64, dtype=dtype)
            inputs[spoiled][...] = torch.nan
            if name != "chunk_kda_gated":
                inputs = {n: inputs[n] for n in ("raw_gate", "A_log", "dt_bias", "lower_bound")}
            out = tensors(function(**inputs))[0]
            assert out.isnan().flatten(2).any(dim=2)[:, 1:].all(), spoiled


# ---------------------------------------------------------------------------- what takes a gate


@every_bound
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_chunks(dtype: torch.dtype, lower_bound: float | None) -> None:
    inputs = chunk_inputs(lower_bound, T=130, K=30, V=8, dtype=dtype)
    assert_finite(kda_ops.fused.chunk_kda_gated(**inputs))
    assert_finite(of_parts(**inputs))
    assert_gradients_are_finite(kda_ops.fused.chunk_kda_gated, inputs)
    assert_gradients_are_finite(of_parts, inputs)


def of_parts(
    q: Tensor, k: Tensor, v: Tensor, raw_gate: Tensor, raw_beta: Tensor, A_log: Tensor,
    dt_bias: Tensor, lower_bound: float | None, initial_state: Tensor, **rest: Any,
) -> Any:  # fmt: skip
    """The same from the small operators, as a layer computes it."""
    g_cumsum = kda_ops.gate_cumsum(raw_gate, A_log, dt_bias, lower_bound=lower_bound)
    return kda_ops.chunk_kda(
        kda_ops.l2norm(q), kda_ops.l2norm(k), v, g_cumsum, torch.sigmoid(raw_beta),
        initial_state=initial_state, output_final_state=True,
    )  # fmt: skip


KERNELS = {"fast": {"K": 64, "V": 64}, "general": {"K": 30, "V": 16}, "fp32": {"dtype": FP32}}
every_kernel = pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS.keys())


@pytest.mark.interpreter
@every_bound
@every_kernel
def test_chunks_in_kernels(options: dict[str, Any], lower_bound: float | None) -> None:
    inputs = chunk_inputs(lower_bound, **{"K": 24, "V": 16, **options})
    assert_finite(run_kernels(kda_ops.fused.chunk_kda_gated)(**inputs))
    assert_finite(run_kernels(of_parts)(**inputs))


@pytest.mark.gpu
@every_bound
@every_kernel
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_chunks_on_the_gpu(
    compile: bool, options: dict[str, Any], lower_bound: float | None
) -> None:
    inputs = on_gpu(chunk_inputs(lower_bound, T=130, **{"K": 24, "V": 16, **options}))
    for function in (kda_ops.fused.chunk_kda_gated, of_parts):
        assert_finite((torch.compile(function, fullgraph=True) if compile else function)(**inputs))


@every_bound
def test_decode(lower_bound: float | None) -> None:
    inputs = decode_inputs(lower_bound)
    assert_finite([kda_ops.fused.kda_decode(**inputs), inputs["state"]])


@pytest.mark.interpreter
@every_bound
def test_decode_in_the_kernel(lower_bound: float | None) -> None:
    inputs = decode_inputs(lower_bound)
    assert_finite([run_kernels(kda_ops.fused.kda_decode)(**inputs), inputs["state"]])


@pytest.mark.gpu
@every_bound
def test_decode_on_the_gpu(lower_bound: float | None) -> None:
    inputs = on_gpu(decode_inputs(lower_bound))
    assert_finite([kda_ops.fused.kda_decode(**inputs), inputs["state"]])


# -------------------------------------------------------------------- forgetting everything at once


def assert_forgets(function: Any, sizes: dict[str, Any]) -> None:
    """A token with an infinite gate input resets the state; gates near it keep their digits."""
    torch.manual_seed(0)
    inputs = with_states(chunk_kda_gated_inputs(CPU, T=80, **sizes))
    inputs["raw_gate"][:, 20] = torch.inf
    o, final = function(**inputs)
    names = ("q", "k", "v", "raw_gate", "raw_beta")
    tail = inputs | {name: inputs[name][:, 20:] for name in names} | {"initial_state": None}
    results = function(**tail)
    tail["raw_gate"] = tail["raw_gate"].nan_to_num(posinf=0.0)  # there is nothing yet to forget
    exact = kda_ops.fused.chunk_kda_gated(**copy_inputs(tail, FP64))
    for out, expected, fp64 in zip((o[:, 20:], final), results, exact, strict=True):
        assert_close(out, expected, fp64, inputs["q"].dtype)


def test_a_gate_that_forgets_in_chunks() -> None:
    assert_forgets(kda_ops.fused.chunk_kda_gated, {"K": 24, "V": 16, "dtype": FP32})


@pytest.mark.interpreter
@every_kernel
def test_a_gate_that_forgets_in_kernels(options: dict[str, Any]) -> None:
    assert_forgets(run_kernels(kda_ops.fused.chunk_kda_gated), {"K": 24, "V": 16, **options})


def assert_steps_forget(function: Any) -> None:
    torch.manual_seed(0)
    inputs = recurrent_inputs(2, 3, 1, 2, 16, 8, FP32, device=CPU)
    inputs["g"][:, 0] = -torch.inf
    fresh = copy_inputs(inputs)
    fresh["state"].zero_()
    assert torch.equal(function(**inputs), function(**fresh))
    slots = inputs["state_indices"]
    assert torch.equal(inputs["state"][slots], fresh["state"][slots])


def test_a_gate_that_forgets_in_steps() -> None:
    assert_steps_forget(kda_ops.recurrent_kda)


@pytest.mark.interpreter
def test_a_gate_that_forgets_in_steps_of_the_kernel() -> None:
    assert_steps_forget(run_kernels(kda_ops.recurrent_kda))


@pytest.mark.parametrize("pages", [False, True], ids=["functional", "paged"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_infinite_sums_are_rejected(compile: bool, pages: bool) -> None:
    """After -inf nothing is left of the gates of a chunk."""
    inputs = chunk_kda_inputs(CPU, T=80, K=16, V=8, cu_seqlens=[0, 70])
    inputs = with_pages(inputs, [1], []) if pages else inputs
    inputs["g_cumsum"][:, 70:] = -torch.inf  # not read
    function = torch.compile(kda_ops.chunk_kda, backend="eager") if compile else kda_ops.chunk_kda
    function(**inputs)
    inputs["g_cumsum"][:, 20:64, 0, 3] = -torch.inf
    before = copy_inputs(inputs)
    with pytest.raises(ValueError, match="g_cumsum must be finite, got -inf at token 20"):
        function(**inputs)
    if pages:
        assert torch.equal(inputs["state"].nan_to_num(), before["state"].nan_to_num())
