"""Whose page a state is on, in which layout, and the shapes in which others keep parameters."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops._cases import k_first, named
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import cases, public_function, run_kernels
from tests.support.oracle import copy_inputs, tensors

CPU = torch.device("cpu")
PAGED = {  # a case of each operator on paged states, with null slots
    "chunk_kda": "pages-fp32",
    "chunk_kda_gated": "pages-fp32",
    "kda_decode": "DS-fp16-gva-K24-V40",
    "recurrent_kda": "decode-fp16-gva-K24-V40",
    "short_conv": "DS",
    "short_conv_qkv": "apart-SD-ragged-bias",
    "short_conv_update": "SD-speculative",
}
STATES = ("state", "conv_state")
paged = pytest.mark.parametrize("name", PAGED)
recurrent = pytest.mark.parametrize(
    "name", ["chunk_kda", "chunk_kda_gated", "kda_decode", "recurrent_kda"]
)
ways = pytest.mark.parametrize(
    "way",
    [
        lambda f: f,
        lambda f: torch.compile(f, fullgraph=True),
        pytest.param(run_kernels, marks=pytest.mark.interpreter),
    ],
    ids=["eager", "compiled", "kernel"],
)
Way = Callable[[Callable[..., Any]], Callable[..., Any]]


def inputs_of(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    (case,) = named(cases(name), PAGED[name])
    return case.make(CPU)


def of_pages(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same call with other states."""

    def changed(x: Any) -> Any:
        return tuple(map(changed, x)) if isinstance(x, tuple) else change(x)

    states = {name: changed(inputs[name]) for name in STATES if name in inputs}
    return {**copy_inputs(inputs), **states}


def run(name: str, way: Way, inputs: dict[str, Any]) -> list[Tensor]:
    """Results, then the states."""
    with torch.no_grad():
        result = tensors(way(public_function(name))(**inputs))
    return [*result, *states_of(inputs)]


def states_of(inputs: dict[str, Any]) -> list[Tensor]:
    return tensors([inputs[name] for name in STATES if name in inputs])


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.nan_to_num(-7), y.nan_to_num(-7))


@ways
@paged
def test_without_slots_a_sequence_is_on_the_page_of_its_number(name: str, way: Way) -> None:
    """Page 0 too; pages past the last sequence are not touched."""
    inputs = of_pages(inputs_of(name), lambda x: torch.randn_like(x, dtype=torch.float32).to(x))
    table = inputs.pop("state_indices")
    dense = copy_inputs(inputs)
    N = len(table)
    behind = of_pages(inputs, lambda x: torch.cat([torch.full_like(x[:1], torch.nan), x]))
    behind["state_indices"] = torch.arange(1, N + 1, dtype=table.dtype)
    found, expected = run(name, way, dense), run(name, way, behind)
    results = len(found) - len(states_of(dense))
    assert_same(found, [*expected[:results], *(x[1:] for x in expected[results:])])
    for new, old in zip(states_of(dense), states_of(inputs), strict=True):
        assert not torch.equal(new[0], old[0])
        assert torch.equal(new[N:], old[N:])


@paged
def test_without_slots_there_are_pages_for_all_sequences(name: str) -> None:
    inputs = inputs_of(name)
    N = len(inputs.pop("state_indices"))
    for state in set(STATES) & set(inputs):
        few = of_pages(inputs, torch.clone)
        few[state] = of_pages(inputs, lambda x: x[: N - 1].clone())[state]
        before = [x.clone() for x in states_of(few)]
        message = f"{state} must have a page for each of {N} sequences without state_indices"
        with pytest.raises(ValueError, match=re.escape(message)):
            public_function(name)(**few)
        assert_same(states_of(few), before)


@ways
@paged
def test_negative_slots_are_padding_like_slot_0(name: str, way: Way) -> None:
    inputs = inputs_of(name)
    table = inputs["state_indices"]
    assert (table == 0).any()

    def with_null(slot: int, pages: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        slots = torch.where(table == 0, torch.full_like(table, slot), table)
        return {**of_pages(inputs, pages), "state_indices": slots}

    expected = run(name, way, with_null(0, torch.clone))
    for slot in (-1, -len(states_of(inputs)[0]), -1000):
        assert_same(run(name, way, with_null(slot, torch.clone)), expected)


@pytest.mark.parametrize("name", ["kda_decode", "recurrent_kda"])
def test_counts_need_slots(name: str) -> None:
    inputs = inputs_of(name)
    count = torch.ones(len(inputs.pop("state_indices")), dtype=torch.int32)
    with pytest.raises(ValueError, match="num_accepted must come with state_indices of shape"):
        public_function(name)(**inputs, num_accepted=count)


@ways
@recurrent
def test_k_first_states_are_stepped_where_they_lie(name: str, way: Way) -> None:
    inputs = inputs_of(name)
    v_first = run(name, way, of_pages(inputs, torch.clone))
    states = {"state": inputs["state"].transpose(-1, -2).contiguous(), "state_layout": "KV"}
    turned = {**of_pages(inputs, torch.clone), **states}
    k_first = run(name, way, turned)
    first = len(v_first) - len(states_of(turned))
    k_first[first] = k_first[first].transpose(-1, -2)
    for x, y in zip(k_first, v_first, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@recurrent
def test_the_layout_of_a_state_is_checked(name: str) -> None:
    """Where K is not V."""
    small = {"chunk_kda": "states-fp32", "chunk_kda_gated": "states-fp32"}
    (case,) = named(cases(name), small.get(name, PAGED[name]))
    right = k_first(case).make(CPU)
    state = "initial_state" if name in small else "state"
    V, K = right[state].mT.shape[-2:]
    before = right[state].clone()
    for wrong, axes in (("VK", (V, K)), (None, None)):
        message = (
            f"state_layout must be 'VK' or 'KV', got {wrong!r}"
            if axes is None
            else f"{axes[0]}, {axes[1]}] in state_layout VK, got"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            public_function(name)(**{**right, "state_layout": wrong})
    assert torch.equal(right[state], before)
    public_function(name)(**right)


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda_gated"])
def test_gradients_of_k_first_states(name: str) -> None:
    (case,) = named(cases(name), "states-fp32")
    torch.manual_seed(0)
    inputs = case.make(CPU)
    gradients = []
    for layout in ("VK", "KV"):
        state = inputs["initial_state"]
        state = state if layout == "VK" else state.transpose(-1, -2).contiguous()
        state.requires_grad_()
        given = {**inputs, "initial_state": state, "state_layout": layout}
        o, final = public_function(name)(**given)
        assert final.shape == state.shape
        (gradient,) = torch.autograd.grad(o.sum() + (final**2).sum(), state)
        gradients.append(gradient if layout == "VK" else gradient.transpose(-1, -2))
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------- shapes of parameters


def as_conv1d(x: Any) -> Any:
    return tuple(map(as_conv1d, x)) if isinstance(x, tuple) else x.unsqueeze(1)


def with_shape(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    if "weight" in inputs and name != "rms_norm_gated":
        changed["weight"] = as_conv1d(inputs["weight"])
    if inputs.get("A_log") is not None:
        changed["A_log"] = inputs["A_log"].view(1, 1, -1, 1)
    assert changed
    return {**inputs, **changed}


SHAPED = {"gate": "bf16", "gate_cumsum": "bf16", **PAGED}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", sorted(set(SHAPED) - {"chunk_kda", "recurrent_kda"}))
def test_parameters_in_the_shapes_of_models(name: str, compile: bool) -> None:
    """`A_log [1, 1, H, 1]` of FLA and transformers, and the weight `[D, 1, W]` of `nn.Conv1d`."""
    chosen = [case for case in cases(name) if case.name == SHAPED[name]] or cases(name)[:1]
    torch.manual_seed(0)
    inputs = chosen[0].make(CPU)
    expected = run(name, lambda f: f, copy_inputs(inputs))
    function = public_function(name)
    call = torch.compile(function, fullgraph=True) if compile else function
    given = with_shape(name, copy_inputs(inputs))
    with torch.no_grad():
        found = [*tensors(call(**given)), *states_of(given)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_gradients_have_the_shapes_that_were_given(compile: bool) -> None:
    torch.manual_seed(0)
    H, K, D = 2, 8, 16

    def loss(x: Tensor, weight: Tensor, A_log: Tensor) -> Tensor:
        y = kda_ops.short_conv(x, weight)
        heads = y.unflatten(-1, (H, K))
        return (kda_ops.gate(heads, A_log) + kda_ops.gate_cumsum(heads, A_log)).square().sum()

    x, weight, A_log = torch.randn(1, 70, D), torch.randn(D, 4), torch.randn(H)
    gradients = []
    for shapes in ((weight.shape, A_log.shape), ((D, 1, 4), (1, 1, H, 1))):
        given = [
            y.clone().view(shape).requires_grad_()
            for y, shape in zip((weight, A_log), shapes, strict=True)
        ]
        call = torch.compile(loss, fullgraph=True) if compile else loss
        found = torch.autograd.grad(call(x, *given), given)
        assert [y.shape for y in found] == [torch.Size(shape) for shape in shapes]
        gradients.append([y.flatten() for y in found])
    for y, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A_log": torch.zeros(1, 1, 2)}, "A_log must have shape [2] or [1, 1, 2, 1], got"),
        ({"A_log": torch.zeros(1, 2, 1, 1)}, "A_log must have shape [2] or [1, 1, 2, 1], got"),
    ],
)
def test_other_shapes_of_rates_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.gate(**{"raw_gate": torch.zeros(3, 2, 8), **change})


def test_other_shapes_of_weights_are_errors() -> None:
    with pytest.raises(ValueError, match="weight must have 2 dimensions, got shape"):
        kda_ops.short_conv(torch.zeros(3, 8), torch.zeros(8, 2, 4))


# ---------------------------------------------------------------------- generated code


def step_in_place(conv: Tensor, state: Tensor, weight: Tensor, **inputs: Any) -> Tensor:
    return kda_ops.fused.kda_decode(
        conv_state=conv, state=state, weight=weight, state_layout="KV", **inputs
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_dense_cache_is_stepped_without_a_copy(dynamic: bool) -> None:
    """Part of a convolution state that holds a row too many, and a state with K first."""
    torch.manual_seed(0)
    (case,) = named(cases("kda_decode"), "DS-fp16-gva-K24-V40")
    inputs = k_first(case).make(CPU)
    for name in ("state_indices", "layout", "state_layout"):
        inputs.pop(name)
    N = inputs["x"].shape[0]
    conv = torch.randn(N, inputs["x"].shape[1], 4).half()
    state, weight = inputs.pop("state")[:N].contiguous(), inputs.pop("weight").unsqueeze(1)
    inputs.pop("conv_state")
    dense = (conv, state)

    def call(conv: Tensor, state: Tensor, weight: Tensor, **given: Any) -> Tensor:
        return step_in_place(conv[..., 1:], state, weight, layout="DS", **given)

    eager = [x.clone() for x in dense]
    with torch.no_grad():
        found, (code,) = cuda_code(call, *dense, weight, dynamic=dynamic, **inputs)
        expected = call(*eager, weight, **inputs)
    torch.testing.assert_close(found, expected)
    for x, y in zip(dense, eager, strict=True):
        torch.testing.assert_close(x, y)
    made = summary(code)
    assert (made.launches, made.externs, made.allocations) == (["kda_decode_kernel"], [], 1)
