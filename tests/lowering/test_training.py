"""Training: the recurrence from raw inputs with its own gradient, what is launched and saved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops import KimiDeltaAttention
from kda_ops._numerics import RCP_LN2
from tests.support.fake_cuda import captured, cuda_code
from tests.support.generated import load
from tests.support.launches import FORBIDDEN, GEMMS, SAVING, Summary, expect, summary
from tests.support.oracle import assert_close
from tests.support.training import Training, trained

REWRITE = "chunk_kda_training"
T, HIDDEN, H, K = 70, 48, 2, 16


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> KimiDeltaAttention:
    torch.manual_seed(0)
    return KimiDeltaAttention(HIDDEN, K, H, dtype=dtype, **options)


def gradients(call: Callable[..., Any], module: Any, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients of a random projection of it: of x and of all parameters."""
    out = call(x, **kwargs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]


VARIANTS = {
    "softplus": ({}, {}),
    "bounded": ({"lower_bound": -5.0, "safe_gate": True}, {}),
    "negative-eigenvalues": ({"allow_neg_eigval": True, "dtype": torch.bfloat16}, {}),
    "value-heads": ({"num_v_heads": 4, "dtype": torch.bfloat16}, {}),
    "no-convolution": ({"use_short_conv": False, "dtype": torch.bfloat16}, {}),
    "sequences": ({}, {"cu_seqlens": torch.tensor([0, 40, 40, 66], dtype=torch.int32)}),
}


def assert_exact(results: list[Tensor], module: Any, x: Tensor, **kwargs: Any) -> None:
    """Holds what `gradients` returned of a compiled module to eager fp64."""
    eager = gradients(module, module, x, **kwargs)
    wide = copy.deepcopy(module).double()
    exact = gradients(wide, wide, x.detach().double().requires_grad_(), **kwargs)
    for result, low, high in zip(results, eager, exact, strict=True):
        assert_close(result, low, high, x.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer(variant: str) -> None:
    """One graph each way, the fused operator and its gradient, and the numbers of eager fp64."""
    options, kwargs = VARIANTS[variant]
    module = layer(**options)
    x = torch.randn(1, T, HIDDEN, dtype=module.in_proj.weight.dtype, requires_grad=True)
    call, found = trained(module)
    results = gradients(call, module, x, **kwargs)
    assert len(found.graphs) == 2
    assert found.fired.count(REWRITE) == 1
    assert "chunk_kda_gated" in found.operators(0)
    assert "chunk_kda_gated_backward" in found.operators(1)
    ours = {"short_conv", "chunk_kda_gated", "rms_norm_gated"}
    assert {n.removesuffix("_backward") for n in found.operators(0) + found.operators(1)} <= (
        ours | {"l2norm"}
    )
    assert_exact(results, module, x, **kwargs)


def step(
    gate: Callable[..., Tensor] | None = None,
    beta_of: Callable[[Tensor], Tensor] = torch.sigmoid,
    normed: Callable[..., Tensor] = kda_ops.l2norm,
    extra: Callable[..., Any] = lambda *_: 0.0,
) -> Callable[..., Tensor]:
    """The recurrence as a model author writes it, and the loss of it."""

    def call(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Tensor:
        q, k = normed(q), normed(k)
        G = kda_ops.gate_cumsum(x, A_log) if gate is None else gate(x, A_log)
        b = beta_of(beta)
        o, _ = kda_ops.chunk_kda(q, k, v, G, b)
        return o.square().sum() + extra(q, G, b, A_log)

    return call


def stepped(function: Callable[..., Any], dtype: torch.dtype, frozen: tuple[int, ...] = ()) -> Any:
    """Runs a loss and its gradients compiled, and holds them to eager fp64."""
    torch.manual_seed(0)
    shapes = [(1, T, H, 64)] * 4 + [(1, T, H)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes] + [torch.randn(H)]
    wide = [x.double() for x in inputs]
    call, found = trained(function)

    def run(loss: Callable[..., Any], values: list[Tensor]) -> list[Tensor]:
        values = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(values)]
        total = loss(*values)
        return [*torch.autograd.grad(total, [x for x in values if x.requires_grad])]

    results, low, high = run(call, inputs), run(function, inputs), run(function, wide)
    for result, eager, exact in zip(results, low, high, strict=True):
        assert_close(result, eager, exact, dtype)
    return found


def in_two(x: Tensor, A_log: Tensor) -> Tensor:
    return kda_ops.chunk_cumsum(kda_ops.gate(x, A_log), scale=RCP_LN2)


def wide_sigmoid(beta: Tensor) -> Tensor:
    return torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32)))


def twice(beta: Tensor) -> Tensor:
    return 2 * wide_sigmoid(beta)


def assert_fused(found: Training, norms: bool) -> None:
    assert found.fired == [REWRITE]
    both = [*found.operators(0), *found.operators(1)]
    assert "chunk_kda_gated_backward" in both
    assert ("l2norm" in both) == (not norms)
    assert not {"gate", "gate_cumsum", "chunk_cumsum", "chunk_kda", "chunk_kda_backward"} & {*both}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("gate", "beta_of"), [(None, wide_sigmoid), (in_two, twice)], ids=["one", "two"]
)
def test_fires(dtype: torch.dtype, gate: Any, beta_of: Any) -> None:
    """With the norms where the kernel takes them, which is in bf16."""
    assert_fused(stepped(step(gate, beta_of), dtype), norms=dtype is torch.bfloat16)


@pytest.mark.parametrize("frozen", [(5,), (3, 5), (4,), (0, 1), (0, 1, 2, 3, 4)], ids=str)
def test_frozen_inputs(frozen: tuple[int, ...]) -> None:
    """Gradients that nobody needs are not computed, and the rest is as it was."""
    found = stepped(step(beta_of=twice), torch.bfloat16, frozen)
    assert_fused(found, norms=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"extra": lambda q, G, b, A: G.sum()}, "gate_cumsum"),
        ({"extra": lambda q, G, b, A: (b * b).sum()}, "beta"),
        ({"extra": lambda q, G, b, A: q.square().sum()}, "l2norm"),
        ({"beta_of": lambda b: torch.sigmoid(b) * 0.5}, "beta is not a sigmoid"),
    ],
)
def test_refuses_what_is_used_elsewhere(options: dict[str, Any], reason: str) -> None:
    """Then everything is as before, and right."""
    options.setdefault("beta_of", twice)
    found = stepped(step(**options), torch.bfloat16)
    assert REWRITE not in found.fired
    (refusal,) = [why for name, why in found.refused if name == REWRITE]
    assert reason in refusal


def with_states(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Tensor:
    initial = k[:, :64].transpose(1, 2)
    o, final = kda_ops.chunk_kda(
        kda_ops.l2norm(q), kda_ops.l2norm(k), v, kda_ops.gate_cumsum(x, A_log), twice(beta),
        initial_state=initial.to(torch.promote_types(q.dtype, torch.float32)),
        output_final_state=True,
    )  # fmt: skip
    return o.square().sum() + final.square().sum()


def test_states() -> None:
    """Their gradients go in and come out."""
    assert_fused(stepped(with_states, torch.float32), norms=False)


def test_checkpointed() -> None:
    """What is recomputed is the fused operator; saved is what the block was given."""
    module = layer()
    x = torch.randn(1, T, HIDDEN, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    call, found = trained(block)
    results = gradients(call, module, x)
    assert found.fired == [REWRITE]
    assert "chunk_kda_gated" in found.operators(1)
    inputs = [x, *module.parameters()]
    assert {tuple(y.shape) for y in found.saved(1).values()} <= {tuple(y.shape) for y in inputs}
    for result, eager in zip(results, gradients(module, module, x), strict=True):
        torch.testing.assert_close(result, eager)


def test_one_graph_for_any_length() -> None:
    """Once the length is dynamic: one graph each way, no break, nothing compiled anew."""
    module = layer()
    call, found = trained(module)
    for length in (70, 133, 64, 200):
        x = torch.randn(1, length, HIDDEN, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = gradients(call, module, x)
        assert_exact(results, module, x)
    assert len(found.graphs) == 2
    assert found.fired == [REWRITE]


GRADIENT = [  # of the recurrence, with norms, gate and sigmoid
    "states_backward_kernel",
    "backward_tiles_kernel",
    "chunk_gradient_kernel",
    "backward_keys_kernel",
    "rms_norm_gated_backward_kernel",
    "short_conv_backward_kernel",
]
MADE = (
    5  # by Inductor: sums for norm, taps and (2) bias; what is added to the projection's gradient
)


def whole_layer() -> tuple[KimiDeltaAttention, Tensor]:
    """A layer whose recurrence takes the norms, and its input."""
    module = KimiDeltaAttention(256, 64, 4, dtype=torch.bfloat16)
    return module, torch.randn(1, 2 * T, 256, dtype=torch.bfloat16, requires_grad=True)


def test_what_is_saved() -> None:
    """Of activations: the layer's input, what is projected from it, what is convolved, the output
    of the recurrence and what `o_proj` takes. No cumulative gate, no beta, nothing normalised.
    """
    module, x = whole_layer()
    call, found = trained(module)
    call(x)
    saved = found.saved(1)
    assert not [name for name in saved if "norm" in name or "cumsum" in name or "sigmoid" in name]
    activations = [y for y in saved.values() if x.shape[1] in y.shape]
    parameters = {tuple(p.shape) for p in module.parameters()}
    assert {tuple(y.shape) for y in saved.values()} - {tuple(y.shape) for y in activations} <= (
        parameters
    )
    storages = {y.untyped_storage()._cdata: y.untyped_storage().nbytes() for y in activations}
    gate_dim = module.num_v_heads * module.head_k_dim
    widths = [
        256,
        sum(module.in_sizes.values()),
        gate_dim,
        module.conv_dim,
        *[module.value_dim] * 3,
    ]
    assert sum(storages.values()) == 2 * x.shape[1] * sum(widths)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_launches(dynamic: bool) -> None:
    """Four launches forward, and backward at most eleven, which are nothing but kernels."""
    module, x = whole_layer()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    _, sources = cuda_code(module, x, dynamic=None if dynamic else False, backward=True)
    forward, backward = (launched(source) for source in sources)
    expect(forward, SAVING)
    assert backward.externs == []
    made = [name for name in backward.launches if name.startswith("triton_")]
    assert sorted({*backward.launches} - {*made}) == sorted(GRADIENT)
    assert len(made) <= MADE, str(backward)
    assert len(backward.launches) <= 11


def test_code_for_a_gpu() -> None:
    """What both graphs compute: the kernels by hand around Inductor's, and the convolution's, which
    reads y's gradient in parts and writes x's into that of the projection.
    """
    module = KimiDeltaAttention(32, 64, 2, dtype=torch.bfloat16)
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16, requires_grad=True)

    def gradients_of_sum(module: Any, x: Tensor) -> list[Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out.sum(), [x, *module.parameters()])]

    out, (_, backward) = cuda_code(module, x, backward=True, load=load)
    assert "'PARTS': 3" in backward
    found = [out, x.grad, *(p.grad for p in module.parameters())]
    low = gradients_of_sum(module, x)
    high = gradients_of_sum(copy.deepcopy(module).double(), x.detach().double().requires_grad_())
    for result, eager, exact in zip(found, low, high, strict=True):
        assert_close(result, eager, exact, x.dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_cuda_graphs_capture_both_graphs(dynamic: bool) -> None:
    module, x = whole_layer()
    with captured() as found:
        cuda_code(module, x, dynamic=dynamic, backward=True)
    assert [graph.mutated_input_idxs for graph in found] == [set(), set()]


def launched(source: str) -> Summary:
    """What a graph launches, without its GEMMs."""
    body = source[source.index("def call(") :]
    assert [text for text in FORBIDDEN if text in body[: body.index("runner =")]] == []
    found = summary(source)
    externs = [name for name in found.externs if name not in GEMMS]
    return Summary(found.launches, externs, found.allocations)
