"""`recurrent_kda` beyond the common cases: definition, slots, ragged batches, errors, code."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.delta_rule.recurrent_kda.cases import CASES, recurrent_inputs
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import run_kernels

CPU = torch.device("cpu")
FP64 = torch.float64
CASE = {case.name: case for case in CASES}


def exact_inputs(*sizes: int, **options: Any) -> dict[str, Any]:
    """fp64 inputs, for comparisons without rounding."""
    return recurrent_inputs(*sizes, dtype=FP64, state_dtype=FP64, device=CPU, **options)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to the order of fp64 sums."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 64 * torch.finfo(FP64).eps * b.abs().max().clamp(min=1)


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Any:
    """One token of one value head as the paper has it, with S `[K, V]`."""
    S = torch.diag(g.exp()) @ S
    S = S + beta * torch.outer(k, v - S.T @ k)
    return S, scale * (S.T @ q)


@pytest.mark.parametrize("name", ["tokens-3", "ragged-spec", "spec-accepted", "ragged"])
def test_reference_is_the_definition(name: str) -> None:
    inputs = CASE[name].make(CPU)
    inputs = {n: x.to(FP64) if x.is_floating_point() else x for n, x in inputs.items()}
    q, k, v, g, beta = (inputs[n].flatten(0, 1) for n in ("q", "k", "v", "g", "beta"))
    indices = inputs["state_indices"]
    per_token = indices.dim() == 2
    N, (HV, V) = len(indices), v.shape[1:]
    H, K = q.shape[1:]
    accepted = inputs.get("num_accepted", torch.ones(N, dtype=torch.int64)).clamp(min=1)
    if "cu_seqlens" in inputs:
        bounds = inputs["cu_seqlens"].tolist()
    else:
        bounds = [n * inputs["q"].shape[1] for n in range(N + 1)]
    expected, o = inputs["state"].clone(), torch.zeros(len(q), HV, V, dtype=FP64)
    for n in range(N):
        slots = indices[n].tolist() if per_token else [int(indices[n])]
        source = slots[accepted[n] - 1]
        if source == 0:
            continue
        for h in range(HV):
            S = inputs["state"][source, h].T
            for j, t in enumerate(range(bounds[n], bounds[n + 1])):
                key = h // (HV // H)
                S, o[t, h] = step(
                    S, q[t, key], k[t, key], v[t, h], g[t, h], beta[t, h], scale=K**-0.5
                )
                target = slots[j] if per_token else source
                if target:
                    expected[target, h] = S.T
    out = kda_ops.recurrent_kda(**inputs)
    assert_same(out.flatten(0, 1), o)
    assert_same(inputs["state"], expected)


def test_many_tokens_equal_single_tokens() -> None:
    inputs = exact_inputs(3, 4, 1, 2, 24, 16)
    whole = dict(inputs, state=inputs["state"].clone())
    o = kda_ops.recurrent_kda(**whole)
    parts = []
    for t in range(4):
        token = {n: inputs[n][:, t : t + 1] for n in ("q", "k", "v", "g", "beta")}
        parts.append(kda_ops.recurrent_kda(**inputs | token))
    assert_same(torch.cat(parts, 1), o)
    assert_same(inputs["state"], whole["state"])


def test_ragged_is_separate_sequences() -> None:
    lengths = [2, 0, 3, 1]
    options = {"num_spec": 2, "accepted": [3, 1, 2, 1], "lengths": lengths, "padding_rows": 2}
    inputs = exact_inputs(4, 0, 2, 2, 16, 24, **options)
    state = inputs["state"].clone()
    o = kda_ops.recurrent_kda(**inputs)
    start = 0
    for n, length in enumerate(lengths):
        one = {x: inputs[x][:, start : start + length] for x in ("q", "k", "v", "g", "beta")} | {
            "state": state,
            "state_indices": inputs["state_indices"][n : n + 1],
        }
        alone = kda_ops.recurrent_kda(**one, num_accepted=inputs["num_accepted"][n : n + 1])
        if length:
            assert_same(o[:, start : start + length], alone)
        start += length
    assert (o[:, start:] == 0).all()
    assert_same(inputs["state"], state)


def test_any_prefix_of_a_draft_can_be_accepted() -> None:
    draft = exact_inputs(2, 4, 1, 1, 16, 16, num_spec=3)
    before = draft["state"].clone()
    o = kda_ops.recurrent_kda(**draft)
    for accepted in (1, 2, 3, 4):
        plain = {n: draft[n][:, :accepted] for n in ("q", "k", "v", "g", "beta")}
        plain["state"], plain["state_indices"] = before.clone(), draft["state_indices"][:, 0]
        assert_same(kda_ops.recurrent_kda(**plain), o[:, :accepted])
        kept = draft["state"][draft["state_indices"][:, accepted - 1].long()]
        assert_same(kept, plain["state"][plain["state_indices"].long()])
        following = exact_inputs(2, 1, 1, 1, 16, 16)
        continued = following | {
            "state": draft["state"].clone(),
            "state_indices": draft["state_indices"],
            "num_accepted": torch.full((2,), accepted),
        }
        stepped = following | {"state": plain["state"], "state_indices": plain["state_indices"]}
        assert_same(kda_ops.recurrent_kda(**continued), kda_ops.recurrent_kda(**stepped))


def check_only_named_slots_are_written(call: Any) -> None:
    inputs = CASE["spec-accepted"].make(CPU)
    before = inputs["state"].clone()
    o = call(**inputs)
    table = inputs["state_indices"]
    untouched = set(range(len(before))) - set(table.flatten().tolist()) | {0}
    for slot in untouched:
        assert torch.equal(inputs["state"][slot], before[slot])
    for slot in set(table.flatten().tolist()) - {0}:
        assert not torch.equal(inputs["state"][slot], before[slot])
    assert (o[2] == 0).all()
    # a token whose state is not kept still has its output and is in the state after it
    assert (o[0, 1] != 0).any()


def check_padding_is_not_read(call: Any) -> None:
    inputs = CASE["ragged"].make(CPU)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 9:] = float("nan")  # behind the last sequence
        inputs[name][:, 3:4] = float("nan")  # the token of the sequence on the null block
    inputs["state"][0] = float("nan")
    o = call(**inputs)
    assert o[:, :3].isfinite().all()
    assert (o[:, 3] == 0).all()
    assert o[:, 4:9].isfinite().all()
    assert (o[:, 9:] == 0).all()
    assert inputs["state"][1:].isfinite().all()


def test_only_named_slots_are_written() -> None:
    check_only_named_slots_are_written(kda_ops.recurrent_kda)


def test_padding_is_not_read() -> None:
    check_padding_is_not_read(kda_ops.recurrent_kda)


@pytest.mark.interpreter
def test_only_named_slots_are_written_by_the_kernel() -> None:
    check_only_named_slots_are_written(run_kernels(kda_ops.recurrent_kda))


@pytest.mark.interpreter
def test_padding_is_not_read_by_the_kernel() -> None:
    check_padding_is_not_read(run_kernels(kda_ops.recurrent_kda))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("state_indices", [[-1, 2**30, -(2**31)], [99, 5, -7], [17, 18, 19], [2**31 - 1, 1, 2]]),
        ("num_accepted", [2**31 - 1, -(2**31), 0, 7]),
    ],
)
def test_kernel_stays_in_bounds_for_any_slots(name: str, values: Any) -> None:
    """Bad state_indices are null, bad counts are clamped; nothing outside the states is touched."""
    inputs = CASE["spec-accepted"].make(CPU)
    inputs[name] = torch.tensor(values, dtype=torch.int32)
    state = inputs["state"]
    expected = dict(inputs, state=state.clone())
    slots = expected["state_indices"]
    expected["state_indices"] = slots.where((slots >= 0) & (slots < len(state)), 0)
    expected["num_accepted"] = inputs["num_accepted"].clamp(1, 3)
    o = run_kernels(kda_ops.recurrent_kda)(**inputs)
    o_expected = run_kernels(kda_ops.recurrent_kda)(**expected)
    assert torch.equal(o, o_expected)
    assert torch.equal(state, expected["state"])


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", [[5, 3, -9, 2**31 - 1, 2], [0, -(2**31), 40, 1, 2**31 - 1]])
def test_kernel_stays_in_bounds_for_any_offsets(offsets: list[int]) -> None:
    inputs = CASE["ragged"].make(CPU)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    unnamed = [s for s in range(len(inputs["state"])) if s not in inputs["state_indices"].tolist()]
    before = inputs["state"].clone()
    run_kernels(kda_ops.recurrent_kda)(**inputs)
    assert torch.equal(inputs["state"][unnamed], before[unnamed])


ERRORS = {
    "q": (lambda x: x[0], "q must have 4 dimensions, got shape (3, 2, 64)"),
    "k": (lambda x: x[..., :32], "k must have shape [4, 3, 2, 64], got (4, 3, 2, 32)"),
    "v": (lambda x: x[:, :, :1], "v must have a multiple of 2 heads like q, got 1"),
    "g": (lambda x: x[..., 0], "g must have shape [4, 3, 2, 64], got (4, 3, 2)"),
    "beta": (lambda x: x.int(), "beta must have dtype float16, bfloat16, float32, float64"),
    "state": (lambda x: x.half(), "state must have dtype bfloat16, float32, float64, got float16"),
    "state_indices": (lambda x: x[:, :2], "state_indices must have a column for each of 3 tokens"),
    "num_accepted": (lambda x: x[:3], "num_accepted must have shape [4], got (3,)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, message = ERRORS[name]
    inputs = CASE["spec-accepted"].make(CPU)
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.recurrent_kda(**inputs | {name: change(inputs[name])})


def test_more_errors() -> None:
    inputs = CASE["spec-accepted"].make(CPU)
    one = inputs | {"state_indices": inputs["state_indices"][:, 0]}
    with pytest.raises(ValueError, match="num_accepted must come with state_indices of shape"):
        kda_ops.recurrent_kda(**one)
    state = inputs["state"].transpose(2, 3)  # [slots, HV, K, V]
    with pytest.raises(ValueError, match=re.escape("state must have shape [15, 2, 48, 64]")):
        kda_ops.recurrent_kda(**inputs | {"state": state})
    with pytest.raises(ValueError, match="q must have batch size 1 with cu_seqlens, got 4"):
        kda_ops.recurrent_kda(**inputs, cu_seqlens=torch.tensor([0, 1]))
    wide = exact_inputs(1, 1, 1, 1, 257, 8)
    with pytest.raises(ValueError, match=re.escape("q must have a head dimension in [1, 256]")):
        kda_ops.recurrent_kda(**wide)
    inputs["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="argument v requires grad"):
        kda_ops.recurrent_kda(**inputs)


VALUE_ERRORS = {
    "slot": (
        "spec-accepted",
        lambda x: x["state_indices"][1].fill_(15),
        "state_indices must be below 15, got 15",
    ),
    "shared slot": (
        "spec-accepted",
        lambda x: x["state_indices"][3].copy_(x["state_indices"][0]),
        "state_indices must not share a slot between sequences",
    ),
    "accepted": (
        "spec-accepted",
        lambda x: x["num_accepted"].fill_(4),
        "num_accepted must be in [1, 3], got 4",
    ),
    "none accepted": (
        "spec-accepted",
        lambda x: x["num_accepted"].fill_(0),
        "num_accepted must be in [1, 3], got 0",
    ),
    "long sequence": (
        "ragged-spec",
        lambda x: x["cu_seqlens"].copy_(torch.tensor([0, 2, 2, 3, 7, 8])),
        "cu_seqlens must have at most 3 tokens per sequence, one per column of state_indices, "
        "got 4",
    ),
    "offsets": (
        "ragged",
        lambda x: x["cu_seqlens"].copy_(torch.tensor([0, 3, 2, 4, 9])),
        "cu_seqlens must not decrease, got 3 then 2 at position 2",
    ),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_value_errors(name: str, compiled: bool) -> None:
    case, change, message = VALUE_ERRORS[name]
    inputs = CASE[case].make(CPU)
    change(inputs)
    before = inputs["state"].clone()
    call = kda_ops.recurrent_kda
    if compiled:
        call = torch.compile(call, fullgraph=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**inputs)
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize("name", ["decode-bf16", "ragged-spec"])
def test_opcheck(name: str) -> None:
    x = CASE[name].make(CPU)
    torch.library.opcheck(
        torch.ops.kda_ops.recurrent_kda.default,
        (
            *(x[n] for n in ("q", "k", "v", "g", "beta", "state", "state_indices")),
            x.get("num_accepted"),
            0.5,
            x.get("cu_seqlens"),
            "VK",
        ),
    )


def second_layer(states: Tensor, **inputs: Tensor) -> Tensor:
    """The operator between pointwise ops, on one layer of a cache."""
    doubled = inputs | {"v": inputs["v"] * 2}
    return kda_ops.recurrent_kda(state=states[1], **doubled) + 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["decode-bf16", "spec-accepted", "ragged-spec"])
def test_generated_cuda_code_writes_the_cache_in_place(name: str, dynamic: bool) -> None:
    inputs = CASE[name].make(CPU)
    state = inputs.pop("state")
    states = torch.stack([state, state])
    eager = dict(inputs, states=states.clone())
    with torch.no_grad():
        out, (code,) = cuda_code(second_layer, dynamic=dynamic, states=states, **inputs)
        expected = second_layer(**eager)
    assert torch.equal(out, expected)
    assert torch.equal(states, eager["states"])
    found = summary(code)
    first, kernel, last = found.launches
    assert (first[:6], kernel, last[:6]) == ("triton", "recurrent_kda_kernel", "triton")
    # twice v and the output are allocated: no copy of the cache, nor of one layer
    assert (found.externs, found.allocations) == ([], 2)
    # the kernel is handed the second layer of the cache itself
    (launch,) = re.findall(r"recurrent_kda_kernel_\d+\.run\((.*)\)", code)
    views = re.findall(r"reinterpret_tensor\(arg\w+, \([^)]*\), \([^)]*\), ([^)]+)\)", launch)
    offsets = [offset for offset in views if offset != "0"]
    assert len(offsets) == 1
    assert dynamic or offsets == [str(state.numel())]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_cpu_writes_the_cache_in_place(dynamic: bool) -> None:
    inputs = CASE["decode-bf16"].make(CPU)
    state = inputs.pop("state")
    states = torch.stack([state, state])
    eager = states.clone()
    expected = second_layer(eager, **inputs)
    compiled = torch.compile(second_layer, fullgraph=True, dynamic=dynamic)
    out, (code,) = torch._inductor.utils.run_and_get_code(compiled, states, **inputs)
    assert torch.equal(out, expected)
    assert torch.equal(states, eager)
    body = code[code.index("def call(") :]
    assert body.count("torch.ops.kda_ops.recurrent_kda.default(") == 1
    # twice v is all that is allocated: no copy of the cache, nor of one layer
    assert body.count("= empty_strided_cpu(") == 1
