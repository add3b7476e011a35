"""`kda_decode` beyond the common cases: definition, composition, slots, errors, generated code."""

import importlib
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kda_ops
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.delta_rule.kda_decode.cases import CASES, kda_decode_inputs
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import run_kernels
from tests.support.oracle import assert_accurate

CPU = torch.device("cpu")
FP64 = torch.float64
CASE = {case.name: case for case in CASES}
STATES = ("conv_state", "state")
VARIED = ["SD-ragged", "DS-ragged-several", "SD-speculative", "DS-speculative", "SD-fp32-bounded"]


def in_fp64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.to(FP64) if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call on separate states."""
    return inputs | {name: inputs[name].clone() for name in STATES}


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to the order of fp64 sums; NaN only in the same places."""
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    if not a.numel():
        return
    a, b = a.nan_to_num(), b.nan_to_num()
    assert (a - b).abs().max() <= 64 * torch.finfo(FP64).eps * b.abs().max().clamp(min=1)


def offsets_of(inputs: dict[str, Any]) -> list[int]:
    if "cu_seqlens" in inputs:
        return inputs["cu_seqlens"].tolist()
    return list(range(len(inputs["x"]) + 1))


def defined(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both states, token by token and head by head as the formulas have it."""
    x, weight, f, z = (inputs[n] for n in ("x", "weight", "raw_gate", "output_gate"))
    f, z, beta = f.reshape(-1, *f.shape[-2:]), z.reshape(-1, *z.shape[-2:]), inputs["raw_beta"][0]
    (HV, K), V, W = f.shape[1:], z.shape[2], weight.shape[1]
    H = (x.shape[1] - HV * V) // (2 * K)
    indices = inputs["state_indices"]
    per_token = indices.dim() == 2
    conv, state = inputs["conv_state"].clone(), inputs["state"].clone()
    rows = conv if inputs["layout"] == "SD" else conv.transpose(1, 2)
    old_rows, old_state = rows.clone(), state.clone()
    o = torch.zeros(1, len(x), HV, V, dtype=FP64)
    bounds = offsets_of(inputs)
    rate = torch.ones(HV) if inputs["A_log"] is None else inputs["A_log"].exp()
    dt_bias = inputs.get("dt_bias", torch.zeros(HV, K))
    for n in range(len(indices)):
        slots = indices[n].tolist() if per_token else [int(indices[n])]
        first = int(inputs["num_accepted"][n]) - 1 if "num_accepted" in inputs else 0
        if all(slot == 0 for slot in slots) or bounds[n] == bounds[n + 1]:
            continue
        window = list(old_rows[slots[0], first : first + W - 1])
        kept = window[1:]
        source = slots[first] if per_token else slots[0]
        S = old_state[source].transpose(1, 2).clone()  # [HV, K, V]
        for j, t in enumerate(range(bounds[n], bounds[n + 1])):
            # without a slot of its own for the convolution, q, k and v are zero
            window.append(x[t])
            kept.append(x[t])
            y = sum(w * row for w, row in zip(weight.T, window[-W:], strict=True))
            y = y + inputs["bias"] if "bias" in inputs else y
            y = y * torch.sigmoid(y) if inputs["activation"] else y
            y = y if slots[0] else 0 * y
            q, k, v = y.split([H * K, H * K, HV * V])
            for hv in range(HV):
                h = hv // (HV // H)
                q_h, k_h = (part[h * K : (h + 1) * K] for part in (q, k))
                q_h = q_h / torch.sqrt(q_h @ q_h + 1e-6)
                k_h = k_h / torch.sqrt(k_h @ k_h + 1e-6)
                raw = f[t, hv] + dt_bias.reshape(HV, K)[hv]
                g = -rate[hv] * torch.log1p(raw.exp())
                if "lower_bound" in inputs:
                    g = inputs["lower_bound"] / (1 + (-rate[hv] * raw).exp())
                S_h = torch.diag(g.exp()) @ S[hv]
                write = inputs["beta_scale"] * torch.sigmoid(beta[t, hv])
                v_h = v[hv * V : (hv + 1) * V]
                S[hv] = S_h + write * torch.outer(k_h, v_h - S_h.T @ k_h)
                o_h = K**-0.5 * S[hv].T @ q_h
                o_h = o_h / torch.sqrt(o_h.square().mean() + 1e-5) * inputs["norm_weight"]
                o[0, t, hv] = o_h * torch.sigmoid(z[t, hv]) if source else 0.0
            target = slots[j] if per_token else source
            if source and target:
                state[target] = S.transpose(1, 2)
        if slots[0]:
            rows[slots[0], : len(kept)] = torch.stack(kept)
    return o, conv, state


@pytest.mark.parametrize("name", [*VARIED, "DS-fp32-bounded-no-rate", "SD-fp32-strided-W2"])
def test_reference_is_the_definition(name: str) -> None:
    inputs = in_fp64(CASE[name].make(CPU))
    if inputs["A_log"] is not None:
        inputs["A_log"] = inputs["A_log"].clamp(max=0.5)  # slower decays: more of the state is seen
    expected = defined(inputs)
    o = kda_ops.fused.kda_decode(**inputs)
    for got, want in zip((o, inputs["conv_state"], inputs["state"]), expected, strict=True):
        assert_same(got, want)


def composed(inputs: dict[str, Any]) -> Tensor:
    """The public operators one after the other, states in place."""
    tables = {n: inputs[n] for n in ("num_accepted", "cu_seqlens") if n in inputs}
    x = kda_ops.short_conv_update(
        inputs["x"],
        inputs["conv_state"],
        inputs["weight"],
        inputs.get("bias"),
        activation=inputs["activation"],
        state_indices=inputs["state_indices"],
        layout=inputs["layout"],
        **tables,
    )
    T, (HV, K), V = len(x), inputs["raw_gate"].shape[-2:], inputs["output_gate"].shape[-1]
    key_dim = (x.shape[1] - HV * V) // 2
    lead = (1, T) if "cu_seqlens" in inputs else (T, 1)
    q, k, v = x.split([key_dim, key_dim, HV * V], dim=-1)
    q, k = (kda_ops.l2norm(part.reshape(*lead, -1, K)) for part in (q, k))
    g = kda_ops.gate(
        inputs["raw_gate"].reshape(*lead, HV, K),
        inputs["A_log"],
        inputs.get("dt_bias"),
        lower_bound=inputs.get("lower_bound"),
    )
    beta = inputs["beta_scale"] * inputs["raw_beta"].double().sigmoid().reshape(*lead, HV)
    o = kda_ops.recurrent_kda(
        q,
        k,
        v.reshape(*lead, HV, V),
        g,
        beta,
        inputs["state"],
        inputs["state_indices"],
        **tables,
    )
    z = inputs["output_gate"].reshape(*lead, HV, V)
    return kda_ops.rms_norm_gated(o, z, inputs["norm_weight"]).reshape(1, T, HV, V)


@pytest.mark.parametrize("name", [*VARIED, "SD-slot-table", "DS-fp16-gva-K24-V40"])
def test_reference_is_the_composition(name: str) -> None:
    inputs = in_fp64(CASE[name].make(CPU))
    separate = copied(inputs)
    o, expected = kda_ops.fused.kda_decode(**inputs), composed(separate)
    rows = offsets_of(inputs)[-1]
    assert_same(o[:, :rows], expected[:, :rows])
    assert (o[:, rows:] == 0).all()
    for state in STATES:
        assert_same(inputs[state], separate[state])


def test_ragged_is_separate_sequences() -> None:
    inputs = in_fp64(CASE["SD-speculative"].make(CPU))
    separate = copied(inputs)
    o = kda_ops.fused.kda_decode(**inputs)
    bounds = offsets_of(inputs)
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        one = separate | {
            name: separate[name][:, rows] for name in ("raw_gate", "raw_beta", "output_gate")
        }
        one |= {name: separate[name][n : n + 1] for name in ("state_indices", "num_accepted")}
        length = torch.tensor([0, bounds[n + 1] - bounds[n]])
        alone = kda_ops.fused.kda_decode(**one | {"x": separate["x"][rows], "cu_seqlens": length})
        assert_same(o[:, rows], alone)
    for state in STATES:
        assert_same(inputs[state], separate[state])


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_any_prefix_of_a_draft_can_be_accepted(layout: str) -> None:
    """After any acceptance, the next step equals that of a sequence decoded token by token."""
    options: dict[str, Any] = {"dtype": FP64, "state_dtype": FP64, "layout": layout}
    draft = kda_decode_inputs(1, 1, 2, 8, 16, lengths=(4,), num_spec=3, device=CPU, **options)
    plain = copied(draft)
    del plain["cu_seqlens"]
    plain["state_indices"] = draft["state_indices"][:, 0]
    o = kda_ops.fused.kda_decode(**draft)
    following = {
        n: torch.randn_like(draft[n]) for n in ("x", "raw_gate", "raw_beta", "output_gate")
    }
    for t in range(4):
        token = {n: draft[n][:, t : t + 1] for n in ("raw_gate", "raw_beta", "output_gate")}
        alone = kda_ops.fused.kda_decode(**plain | token | {"x": draft["x"][t : t + 1]})
        assert_same(o[:, t : t + 1], alone)
        token = {n: following[n][:, :1] for n in ("raw_gate", "raw_beta", "output_gate")} | {
            "x": following["x"][:1]
        }
        step = {"num_accepted": torch.tensor([t + 1]), "cu_seqlens": torch.tensor([0, 1])}
        continued = kda_ops.fused.kda_decode(**copied(draft) | token | step)
        assert_same(continued, kda_ops.fused.kda_decode(**copied(plain) | token))


def check_what_is_skipped(call: Any) -> None:
    """NaN wherever nothing may be read; unused slots keep their bits."""
    inputs = CASE["SD-speculative"].make(CPU)
    inputs["num_accepted"][1] = 1  # its second slot is the null block
    table, bounds = inputs["state_indices"], offsets_of(inputs)
    null = slice(bounds[3], bounds[4])
    inputs["x"][null] = float("nan")
    for name in ("raw_gate", "raw_beta", "output_gate"):
        inputs[name][:, null] = float("nan")
    for name in STATES:
        inputs[name][0] = float("nan")
    before = copied(inputs)
    o = call(**inputs)
    assert (o[:, null] == 0).all()
    assert (o[:, bounds[-1] :] == 0).all()
    assert o.isfinite().all()
    assert (o[:, : bounds[2]].abs().amax(-1) > 0).all()
    convolved = set(table[:, 0].tolist()) - {0, int(table[2, 0])}  # sequence 2 is empty
    written = {int(s) for n in (0, 1, 3, 4) for s in table[n, : bounds[n + 1] - bounds[n]]} - {0}
    for name, slots in (("conv_state", convolved), ("state", written)):
        for slot in range(len(inputs[name])):
            same = torch.equal(inputs[name][slot].nan_to_num(), before[name][slot].nan_to_num())
            assert same == (slot not in slots), (name, slot)
        assert inputs[name][1:].isfinite().all()


def test_skipped_rows() -> None:
    check_what_is_skipped(kda_ops.fused.kda_decode)


@pytest.mark.interpreter
def test_rows_skipped_by_the_kernel() -> None:
    check_what_is_skipped(run_kernels(kda_ops.fused.kda_decode))


@pytest.mark.interpreter
@pytest.mark.parametrize("version", [(3, 6), (3, 7)], ids=str)
@pytest.mark.parametrize("name", VARIED)
def test_state_tiles_on_all_triton_versions(name: str, version: tuple[int, int]) -> None:
    case = next(case for case in CASES if case.name == name)
    kernels = importlib.import_module("kda_ops.delta_rule.kda_decode.kernel")
    with mock.patch.object(kernels, "TRITON", version):
        assert_accurate(run_kernels(kda_ops.fused.kda_decode), kda_ops.fused.kda_decode, case)


@pytest.mark.parametrize(("sequences", "elements"), [(1, 16), (4, 16), (5, 64)])
def test_few_sequences_use_narrower_lines(sequences: int, elements: int) -> None:
    """See `perf/notes/decode.md`: 4 % of a step of one, where 64 sequences would lose 8 %."""
    kernel = importlib.import_module("kda_ops.delta_rule.kda_decode.kernel")
    state = torch.empty(1, 1, 128, 128)
    assert kernel.tile_of(128, 128, state, "SD", sequences, 1)["INNER_K"] == elements


@pytest.mark.interpreter
def test_nan_stays_in_its_sequence() -> None:
    inputs = CASE["DS-ragged-several"].make(CPU)
    clean = copied(inputs)
    poisoned = copied(inputs) | {"x": inputs["x"].clone()}
    poisoned["x"][1] = float("nan")  # of the first sequence
    call = run_kernels(kda_ops.fused.kda_decode)
    o, expected = call(**poisoned), call(**clean)
    assert o[:, 1].isnan().all()
    assert torch.equal(o[:, [0, 2, 3, 4, 5]], expected[:, [0, 2, 3, 4, 5]])
    slot = int(inputs["state_indices"][0])
    for name in STATES:
        others = [s for s in range(len(clean[name])) if s != slot]
        assert torch.equal(poisoned[name][others], clean[name][others])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "indices", [[[-1, 2**30], [99, 5], [17, 1]], [[2**31 - 1, 3], [4, -(2**31)], [8, 9]]]
)
@pytest.mark.parametrize("accepted", [[2**31 - 1, -(2**31), 0], [7, 2, 1]])
@pytest.mark.parametrize("offsets", [[0, 2, 4, 5], [5, 3, -9, 2**31 - 1], [0, -(2**31), 900, 1]])
def test_kernel_stays_in_bounds_for_any_values(
    indices: list[list[int]], accepted: list[int], offsets: list[int]
) -> None:
    """Pools with room on both sides: only named slots inside the window change."""
    inputs = kda_decode_inputs(
        3, 1, 1, 8, 8, dtype=torch.float32, lengths=(2, 2, 1), num_spec=1, device=CPU
    )
    conv, state = torch.zeros(16, 4, 24), torch.zeros(16, 1, 8, 8)
    x = torch.zeros(15, 24)
    x[5:10] = inputs["x"]
    inputs |= {"x": x[5:10], "conv_state": conv[4:12], "state": state[4:12]}
    inputs["state_indices"] = torch.tensor(indices, dtype=torch.int32)
    inputs["num_accepted"] = torch.tensor(accepted, dtype=torch.int32)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    o = run_kernels(kda_ops.fused.kda_decode)(**inputs)
    named = {slot for row in indices for slot in row if 0 < slot < 8}
    for s in range(16):
        if s - 4 not in named:
            assert (conv[s] == 0).all(), s
            assert (state[s] == 0).all(), s
    assert o.shape == (1, 5, 1, 8)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": lambda x: x[None]}, "x must have 2 dimensions, got shape (1, 11, 192)"),
    ({"x": lambda x: x[:10]}, "raw_gate must have 10 tokens like x, got shape (1, 11, 3, 48)"),
    ({"weight": lambda x: x[1:]}, "weight must have shape [192, 4], got (191, 4)"),
    ({"weight": lambda x: x[:, :1]}, "weight must have shape [D, W] with W at least 2"),
    ({"layout": lambda x: "ds"}, "layout must be one of SD, DS, auto, got 'ds'"),
    ({"layout": lambda x: "DS"}, "conv_state must have shape [slots, 192, L]"),
    ({"activation": lambda x: "relu"}, "activation must be 'silu', 'swish' or None, got 'relu'"),
    (
        {"raw_gate": lambda x: x.int()},
        "raw_gate must have dtype float16, bfloat16, float32, float64, got int32",
    ),
    (
        {"raw_gate": lambda x: x[..., :40]},
        "dt_bias must have shape [3, 40] or [120], got (3, 48)",
    ),
    (
        {"output_gate": lambda x: x[..., :2, :]},
        "output_gate must have shape [..., 3, V], got (1, 11, 2, 32)",
    ),
    (
        {"output_gate": lambda x: x[:, 1:]},
        "output_gate must have 11 tokens like x, got shape (1, 10, 3, 32)",
    ),
    ({"raw_beta": lambda x: x[:, :2]}, "raw_beta must have 11 tokens like x, got shape (1, 2, 3)"),
    ({"raw_beta": lambda x: x[..., :2]}, "raw_beta must have shape [1, 11, 3], got (1, 11, 2)"),
    ({"A_log": lambda x: None}, "A_log must be given unless lower_bound is, got None"),
    ({"A_log": lambda x: x[1:]}, "A_log must have shape [3] or [1, 1, 3, 1], got (2,)"),
    ({"dt_bias": lambda x: x[1:]}, "dt_bias must have shape [3, 48] or [144], got (2, 48)"),
    ({"lower_bound": lambda x: -6.0}, "lower_bound must be None or in [-5, 0), got -6.0"),
    ({"norm_weight": lambda x: x[1:]}, "norm_weight must have shape [32], got (31,)"),
    ({"norm_eps": lambda x: -1.0}, "norm_eps must not be negative, got -1.0"),
    ({"qk_norm_eps": lambda x: -1.0}, "qk_norm_eps must not be negative, got -1.0"),
    ({"state": lambda x: x.transpose(2, 3)}, "state must have shape [18, 3, 32, 48]"),
    ({"state": lambda x: x.half()}, "state must have dtype bfloat16, float32, float64"),
    ({"state_indices": lambda x: x[1:]}, "state_indices must have shape [5, 3], got (4, 3)"),
    (
        {"state_indices": lambda x: x[:, :0]},
        "state_indices must have a column for each of 1 tokens",
    ),
    ({"state_indices": lambda x: x[:, 0]}, "num_accepted must come with state_indices of shape"),
    ({"num_accepted": lambda x: x[1:]}, "num_accepted must have shape [5], got (4,)"),
    ({"num_accepted": lambda x: x.float()}, "num_accepted must have dtype int32, int64"),
    ({"cu_seqlens": lambda x: None}, "state_indices must have shape [11, 3], got (5, 3)"),
    ({"conv_state": lambda x: torch.zeros(18, 11, 192)}, "conv_state must have L at most 10"),
    ({"output_gate": lambda x: x.to("meta")}, "output_gate must be on cpu like x, got meta"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors(change: dict[str, Any], message: str) -> None:
    inputs = kda_decode_inputs(
        5, 1, 3, 48, 32, lengths=(2, 3, 0, 1, 2), padding_rows=3, num_spec=2,
        accepted=(1, 2, 3, 1, 3), device=CPU,
    )  # fmt: skip
    changed = {name: f(inputs.get(name)) for name, f in change.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.fused.kda_decode(**inputs | changed)


def test_heads_must_fit() -> None:
    inputs = kda_decode_inputs(2, 2, 2, 16, 16, device=CPU)
    message = "x must have shape [T, 2 H K + 32] with K = 16 and H a divisor of 2, got (2, 97)"
    wide = {n: F.pad(inputs[n], (0, 1)) for n in ("x", "conv_state")}
    wide["weight"] = F.pad(inputs["weight"], (0, 0, 0, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.fused.kda_decode(**inputs | wide)
    inputs["raw_gate"] = inputs["raw_gate"].requires_grad_()
    with pytest.raises(RuntimeError, match="argument raw_gate requires grad"):
        kda_ops.fused.kda_decode(**inputs)


VALUE_ERRORS: dict[str, Any] = {
    "slot": (lambda x: x["state_indices"][1].fill_(18), "state_indices must be below 18, got 18"),
    "shared": (
        lambda x: x["state_indices"][1].copy_(x["state_indices"][0]),
        "state_indices must not share a slot between sequences",
    ),
    "accepted": (lambda x: x["num_accepted"].fill_(4), "num_accepted must be in [1, 3], got 4"),
    "offsets": (lambda x: x["cu_seqlens"].add_(1), "cu_seqlens must start at 0, got 1"),
    "longest": (
        lambda x: x["cu_seqlens"].copy_(torch.tensor([0, 4, 5, 5, 6, 8])),
        "cu_seqlens must have at most 3 tokens per sequence, one per column of state_indices, "
        "got 4",
    ),
    "conv slots": (
        lambda x: x.update(conv_state=x["conv_state"][:1]),
        "state_indices must be below 1, got",
    ),
    "conv room": (
        lambda x: x.update(conv_state=x["conv_state"][:, :4]),
        "cu_seqlens must have at most 2 tokens per sequence for a conv_state of shape "
        "(18, 4, 208), got 3",
    ),
    "conv accepted": (
        lambda x: x.update(
            conv_state=x["conv_state"][:, :4], cu_seqlens=torch.tensor([0, 1, 2, 2, 3, 4])
        ),
        "num_accepted must be at most 2 for a conv_state of shape (18, 4, 208), got 3",
    ),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_errors(name: str) -> None:
    change, message = VALUE_ERRORS[name]
    inputs = kda_decode_inputs(
        5, 1, 3, 8, 64, lengths=(2, 3, 0, 1, 2), num_spec=2, accepted=(1, 2, 3, 1, 3), device=CPU
    )
    change(inputs)
    before = copied(inputs)
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.fused.kda_decode(**inputs)
    for state in STATES:
        assert torch.equal(inputs[state], before[state])


def paged_step(layout: str) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """A step whose two states are segments of the same pages, with two layers in the cache."""
    inputs = kda_decode_inputs(
        3, 1, 2, 16, 32, layout, lengths=(1, 1, 1), null=(1,), padding_rows=1, device=CPU
    )
    spec = KDAStateSpec(1, 2, 16, 32, conv_dtype=torch.bfloat16, layout=layout)
    conv, state = spec.allocate(len(inputs["state"]), layers=2)
    for name, pages in (("conv_state", conv), ("state", state)):
        pages.copy_(inputs.pop(name)[None])
    for name in ("x", "raw_gate", "raw_beta", "output_gate"):
        inputs[name] = inputs[name].nan_to_num()
    return inputs, (conv, state)


def second_layer(conv: Tensor, recurrent: Tensor, **inputs: Any) -> Tensor:
    """The operator between pointwise ops, on one layer of a cache."""
    inputs = inputs | {"x": inputs["x"] * 2}
    return kda_ops.fused.kda_decode(conv_state=conv[1], state=recurrent[1], **inputs) + 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_generated_code_writes_both_states_in_place(layout: str, dynamic: bool) -> None:
    inputs, states = paged_step(layout)
    _, eager = paged_step(layout)
    for twin, pages in zip(eager, states, strict=True):
        twin.copy_(pages)
    with torch.no_grad():
        out, (code,) = cuda_code(second_layer, *states, dynamic=dynamic, **inputs)
        expected = second_layer(*eager, **inputs)
    assert torch.equal(out, expected)
    for pages, twin in zip(states, eager, strict=True):
        assert torch.equal(pages, twin)
    found = summary(code)
    first, kernel, last = found.launches
    assert (first[:6], kernel, last[:6]) == ("triton", "kda_decode_kernel", "triton")
    # twice x, the output and one more than it are allocated: no copy of a state
    assert (found.externs, found.allocations) == ([], 3)
