"""`KimiDeltaAttention`: its definition token by token, paged states, gradients, one graph."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from kda_ops import config
from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from tests.support.fake_cuda import cuda_code, summary
from tests.support.generated import load
from tests.support.oracle import assert_close

BF16, FP32 = torch.bfloat16, torch.float32
HIDDEN, HEADS, HEAD_DIM = 64, 2, 32
SLOTS = 23  # no other size in these tests is 23: an allocation of that size is a copy of a cache

LAYOUTS = ["SD", "DS"]
GATES = {"softplus": {}, "bounded": {"lower_bound": -5.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "bounded": {"lower_bound": -5.0},
    "grouped-wide-values": {"num_v_heads": 4, "expand_v": 1.5, "conv_layout": "DS"},
    "full-rank": {"forget_gate_rank": None, "output_gate_rank": None, "output_gate_bias": False},
    "ranks": {"forget_gate_rank": 8, "output_gate_rank": 5, "safe_gate": True, "lower_bound": -1.0},
    "negative-eigenvalues": {"allow_neg_eigval": True, "conv_bias": True, "conv_size": 3},
    "no-conv": {"use_short_conv": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())

State = tuple[Tensor | None, Tensor]


def make_layer(dtype: torch.dtype = FP32, **options: Any) -> KimiDeltaAttention:
    """A layer for inference; rates as after training, and a norm weight that is not all ones."""
    layer = KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS, dtype=dtype, **options)
    torch.nn.init.normal_(layer.o_norm_weight, 1.0, 0.2)
    return layer.requires_grad_(False)


def in_fp64(layer: KimiDeltaAttention) -> KimiDeltaAttention:
    return copy.deepcopy(layer).double()


def naive(layer: KimiDeltaAttention, hidden: Tensor, lengths: list[int] | None = None) -> Tensor:
    """The layer as its docstring defines it: token by token, head by head, without operators."""
    if lengths is not None:
        rows = torch.cat([naive(layer, x) for x in hidden.split(lengths)])
        return rows
    K, V = layer.head_k_dim, layer.head_v_dim
    groups = layer.num_v_heads // layer.num_heads
    rows = layer.in_proj.weight.split(list(layer.in_sizes.values()))
    parts = {name: hidden @ part.T for name, part in zip(layer.in_sizes, rows, strict=True)}
    x = torch.cat([parts[name] for name in "qkv"], dim=-1)
    forget, output_gate, beta = parts["f"], parts.get("g", hidden), parts["b"]
    if layer.f_proj is not None:
        forget = forget @ layer.f_proj.weight.T
    if layer.g_proj is not None:
        output_gate = output_gate @ layer.g_proj.weight.T
        if layer.g_proj.bias is not None:
            output_gate = output_gate + layer.g_proj.bias
    beta = torch.sigmoid(beta) * (2 if layer.allow_neg_eigval else 1)
    A_log, dt_bias = (p.to(hidden.dtype) for p in (layer.A_log, layer.dt_bias))
    S = [hidden.new_zeros(K, V)] * layer.num_v_heads
    outputs = []
    for t in range(len(hidden)):
        y = x[t]
        if layer.use_short_conv:
            W = layer.conv_size
            y = torch.zeros_like(x[t]) if layer.conv_bias is None else layer.conv_bias.clone()
            for w in range(W):
                if t - (W - 1) + w >= 0:
                    y = y + layer.conv_weight[:, w] * x[t - (W - 1) + w]
        y = y / (1 + torch.exp(-y))
        o = []
        for head in range(layer.num_v_heads):
            key_head, columns = head // groups, slice(head * V, (head + 1) * V)
            q = y[key_head * K : (key_head + 1) * K]
            k = y[layer.key_dim + key_head * K : layer.key_dim + (key_head + 1) * K]
            v = y[2 * layer.key_dim :][columns]
            q, k = (u / torch.sqrt((u * u).sum() + 1e-6) for u in (q, k))
            z = forget[t, head * K : (head + 1) * K] + dt_bias[head * K : (head + 1) * K]
            a = torch.exp(A_log[head])
            if layer.lower_bound is None:
                g = -a * torch.logaddexp(z, torch.zeros_like(z))
            else:
                g = layer.lower_bound * torch.sigmoid(a * z)
            S[head] = torch.exp(g)[:, None] * S[head]
            S[head] = S[head] + beta[t, head] * torch.outer(k, v - k @ S[head])
            u = K**-0.5 * q @ S[head]
            u = u / torch.sqrt((u * u).mean() + layer.norm_eps) * layer.o_norm_weight
            o.append(u * torch.sigmoid(output_gate[t, columns]))
        outputs.append(torch.cat(o) @ layer.o_proj.weight.T)
    return torch.stack(outputs) if outputs else hidden.clone()


def make_state(layer: KimiDeltaAttention, *, num_spec: int = 0, slots: int = SLOTS) -> State:
    """States as on a server: views of pages, with garbage where nothing was written."""
    state = layer.state_spec(num_spec=num_spec).allocate(slots)
    for x in state:
        if x is not None:
            x.copy_(torch.randn(x.shape))
    return state


def clone_state(state: State) -> State:
    """A copy with the strides of the pages."""
    copies = []
    for x in state:
        if x is not None:
            fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            x = fresh.copy_(x)
        copies.append(x)
    return copies[0], copies[1]


def assert_same(out: Tensor, expected: Tensor) -> None:
    """Two computations in fp64 agree to fp32 precision."""
    assert out.dtype == expected.dtype == torch.float64
    assert_close(out.float(), expected.float(), expected)


# ---------------------------------------------------------------------------------- definition


@every_variant
def test_layer_is_its_definition(variant: dict[str, Any]) -> None:
    layer = in_fp64(make_layer(**variant))
    lengths = [70, 0, 1, 9]
    x = torch.randn(1, sum(lengths), HIDDEN).double()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    assert_same(layer(x, cu_seqlens=cu_seqlens), naive(layer, x[0], lengths)[None])


def test_batch_entries_are_sequences() -> None:
    layer = in_fp64(make_layer())
    x = torch.randn(3, 66, HIDDEN).double()
    assert_same(layer(x), torch.stack([naive(layer, row) for row in x]))


def test_rows_past_the_last_sequence_are_zero() -> None:
    layer = make_layer(BF16)
    x = torch.randn(1, 80, HIDDEN, dtype=BF16)
    cu_seqlens = torch.tensor([0, 33, 70], dtype=torch.int32)
    expected = layer(x[:, :70], cu_seqlens=cu_seqlens)
    x[:, 70:] = torch.nan
    out = layer(x, cu_seqlens=cu_seqlens)
    assert torch.equal(out[:, :70], expected)
    assert not out[:, 70:].any()


# ------------------------------------------------------------------------------- paged states


def feed_in_pieces(
    call: Callable[..., Tensor],
    x: Tensor,
    state: State,
    slot: int,
    pieces: list[tuple[str, int]],
) -> Tensor:
    """One sequence `x [T, hidden]` through prefill chunks and single-token decodes."""
    outputs, start = [], 0
    for kind, length in pieces:
        for n in [length] if kind == "prefill" else [1] * length:
            if kind == "prefill":
                batch = KDABatch.prefill([n], [slot], has_initial_state=[start > 0])
            else:
                batch = KDABatch.decode([slot])
            outputs.append(call(x[None, start : start + n], state=state, batch=batch)[0])
            start += n
    assert start == len(x)
    return torch.cat(outputs)


def random_pieces(T: int, generator: torch.Generator) -> Iterator[tuple[str, int]]:
    """Chunks of 1 to 90 tokens, some as single tokens; the first is a prefill."""
    start = 0
    while start < T:
        decode = start > 0 and int(torch.randint(2, (), generator=generator))
        most = 5 if decode else 90
        n = min(int(torch.randint(1, most + 1, (), generator=generator)), T - start)
        yield ("decode" if decode else "prefill", n)
        start += n


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, FP32) for name in VARIANTS), ("softplus", BF16), ("bounded", BF16)],
)
def test_prompt_in_random_pieces(name: str, dtype: torch.dtype) -> None:
    layer = make_layer(dtype, **VARIANTS[name])
    x = torch.randn(220, HIDDEN, dtype=dtype)
    state = make_state(layer)
    before = clone_state(state)
    pieces = list(random_pieces(len(x), torch.Generator().manual_seed(3)))
    assert {kind for kind, _ in pieces} == {"prefill", "decode"}
    out = feed_in_pieces(layer, x, state, 5, pieces)

    whole, (_, recurrent) = layer(x[None], output_state=True)
    exact, (_, exact_recurrent) = in_fp64(layer)(x[None].double(), output_state=True)
    assert_close(out, whole[0], exact[0])
    assert_close(state[1][5], recurrent[1], exact_recurrent[1], operand_dtype=dtype)
    for now, then in zip(state, before, strict=True):
        if now is not None:
            others = [i for i in range(SLOTS) if i != 5]
            assert torch.equal(now[others], then[others])


@every_layout
def test_fresh_pages_continue(layout: str) -> None:
    """`output_state` without a state gives pages that a decode takes."""
    layer = make_layer(conv_layout=layout)
    x = torch.randn(3, 71, HIDDEN)
    out, state = layer(x[:, :70], output_state=True)
    last = layer(x[:, 70:].transpose(0, 1), state=state, batch=KDABatch.decode([1, 2, 3]))
    exact = in_fp64(layer)(x.double())
    whole = layer(x)
    assert_close(out, whole[:, :70], exact[:, :70])
    assert_close(last[0], whole[:, 70], exact[:, 70])


@every_layout
@every_gate
def test_speculative_decode_is_plain_decode(layout: str, gate: dict[str, Any]) -> None:
    """Drafts of random length, a random number of them right, the others noise."""
    num_spec, prompt = 3, 67
    layer = make_layer(conv_layout=layout, **gate)
    x = torch.randn(3, prompt + 30, HIDDEN)
    slots = torch.arange(1, 13, dtype=torch.int32).view(3, 4)
    state = make_state(layer, num_spec=num_spec)
    prompts = x[:, :prompt].reshape(1, -1, HIDDEN)
    first = layer(prompts, state=state, batch=KDABatch.prefill([prompt] * 3, slots))
    outputs = [[rows] for rows in first.view(3, prompt, HIDDEN)]
    done, accepted = [prompt] * 3, [1, 1, 1]
    generator = torch.Generator().manual_seed(1)
    while min(done) < x.shape[1]:
        rows, lengths, right = [], [], []
        for n in range(3):
            left = x.shape[1] - done[n]
            q = min(int(torch.randint(1, num_spec + 2, (), generator=generator)), left)
            a = int(torch.randint(1, q + 1, (), generator=generator)) if q else 0
            rows += [x[n, done[n] : done[n] + a], torch.randn(q - a, HIDDEN)]
            lengths.append(q)
            right.append(a)
        batch = KDABatch.decode(slots, lengths=lengths, num_accepted=accepted)
        out = layer(torch.cat(rows)[None], state=state, batch=batch)[0].split(lengths)
        for n in range(3):
            outputs[n].append(out[n][: right[n]])
            done[n] += right[n]
            accepted[n] = right[n] or accepted[n]
    exact = in_fp64(layer)(x.double())
    assert_close(torch.stack([torch.cat(rows) for rows in outputs]), layer(x), exact)


def mixed_batch(
    num_tokens: int, decodes: int = 4, lengths: tuple[int, ...] = (70, 1, 0, 40, 5)
) -> KDABatch:
    """Decodes in slots 1.., then prefills, of which every other one continues."""
    return KDABatch.mixed(
        [1] * decodes,
        lengths,
        list(range(1, decodes + len(lengths) + 1)),
        has_initial_state=[n % 2 == 0 for n in range(len(lengths))],
        num_tokens=num_tokens,
    )


def separate_calls(layer: KimiDeltaAttention, x: Tensor, state: State) -> Tensor:
    """What `mixed_batch(130)` does in one call, sequence by sequence."""
    outputs = [
        layer(x[:, n : n + 1], state=state, batch=KDABatch.decode([n + 1])) for n in range(4)
    ]
    start = 4
    for slot, n in zip((5, 6, 7, 8, 9), (70, 1, 0, 40, 5), strict=True):
        batch = KDABatch.prefill([n], [slot], has_initial_state=[slot % 2 == 1])
        outputs.append(layer(x[:, start : start + n], state=state, batch=batch))
        start += n
    return torch.cat([*outputs, x.new_zeros(1, 130 - start, HIDDEN)], dim=1)


@every_variant
def test_mixed_batch_is_separate_calls(variant: dict[str, Any]) -> None:
    layer = make_layer(BF16, **variant)
    state = make_state(layer)
    separate = clone_state(state)
    oracle = tuple(None if x is None else x.double() for x in state)
    x = torch.randn(1, 130, HIDDEN, dtype=BF16)
    exact = separate_calls(in_fp64(layer), x.double(), oracle)
    expected = separate_calls(layer, x, separate)
    x[:, 120:] = torch.nan  # padding rows
    out = layer(x, state=state, batch=mixed_batch(130))
    assert_close(out, expected, exact)
    assert not out[:, 120:].any()
    for s, r, e in zip(state, separate, oracle, strict=True):
        if s is not None:
            assert_close(s, r, e, operand_dtype=BF16)


@every_layout
def test_null_slot_and_padding_rows(layout: str) -> None:
    """A decode batch padded for a CUDA graph: sequences in slot 0, rows past the last one."""
    layer = make_layer(conv_layout=layout)
    state = make_state(layer)
    other, before = clone_state(state), clone_state(state)
    x = torch.randn(1, 6, HIDDEN)
    batch = KDABatch.decode([3, 0, 4, 0], num_tokens=6)
    expected = layer(x, state=other, batch=batch)
    x[:, 4:] = torch.nan
    out = layer(x, state=state, batch=batch)
    assert torch.equal(out, expected)
    assert out[:, [0, 2]].all()
    assert not out[:, [1, 3, 4, 5]].any()
    for now, then, same in zip(state, before, other, strict=True):
        assert torch.equal(now, same)
        untouched = [i for i in range(SLOTS) if i not in (3, 4)]
        assert torch.equal(now[untouched], then[untouched])
        assert not torch.equal(now[3], then[3])


# ---------------------------------------------------------------------- gradients and casting


@every_gate
def test_gradients(gate: dict[str, Any]) -> None:
    """Compiled against eager and fp64, and fp64 against the definition's own gradients.

    Summed over several inputs: `A_log` has one element per head, and the rounding of two canceling
    sums is luck.
    """
    layer = make_layer(conv_bias=True, **gate).requires_grad_(True)
    xs = torch.randn(4, 1, 90, HIDDEN)
    cu_seqlens = torch.tensor([0, 67, 90], dtype=torch.int32)
    weight = torch.randn(1, 90, HIDDEN)

    def gradients(f: Any, module: KimiDeltaAttention, dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for x in xs:
            inputs = x.clone().to(dtype).requires_grad_(True)
            module.zero_grad()
            (f(inputs, cu_seqlens=cu_seqlens) * weight.to(dtype)).sum().backward()
            for name, p in (*module.named_parameters(), ("x", inputs)):
                assert p.grad is not None, name
                found.setdefault(name, []).append(p.grad.clone())
        return {name: torch.stack(g) for name, g in found.items()}

    def definition(inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
        return naive(twin, inputs[0], cu_seqlens.diff().tolist())[None]

    twin = in_fp64(layer)
    exact = gradients(twin, twin, torch.float64)
    for name, g in gradients(definition, twin, torch.float64).items():
        assert_same(exact[name], g)
    eager = gradients(layer, layer, FP32)
    compiled = gradients(torch.compile(layer, fullgraph=True), layer, FP32)
    for name, g in exact.items():
        assert g.abs().sum() > 0, name
        assert_close(compiled[name], eager[name], g)


def test_a_state_has_no_gradient() -> None:
    layer = make_layer().requires_grad_(True)
    with pytest.raises(RuntimeError, match="writes its state in place and has no gradient"):
        layer(torch.randn(1, 5, HIDDEN), output_state=True)


def test_rates_stay_in_fp32() -> None:
    layer = make_layer()
    rates = layer.A_log.clone(), layer.dt_bias.clone()
    layer.to(BF16)
    assert {p.dtype for n, p in layer.named_parameters() if n not in ("A_log", "dt_bias")} == {BF16}
    assert torch.equal(layer.A_log, rates[0])
    assert torch.equal(layer.dt_bias, rates[1])
    assert layer.double().A_log.dtype == torch.float64


# ------------------------------------------------------------------------------------ compiled


def mode_arguments(mode: str, layer: KimiDeltaAttention, size: int) -> dict[str, Any]:
    """Arguments of one forward; all counts and lengths differ between sizes 0, 1 and 2.

    None of them are equal by chance: PyTorch would specialize on that and recompile when it no
    longer holds.
    """
    T, N = (140, 210, 300)[size], (5, 6, 8)[size]
    x = torch.randn(N - 2 if mode == "batch" else 1, T, HIDDEN, dtype=BF16)
    if mode in ("one", "batch"):
        return {"hidden_states": x}
    if mode == "varlen":
        cu_seqlens = torch.tensor([0, *range(1, 10 * N, 10), T - 3], dtype=torch.int32)
        return {"hidden_states": x, "cu_seqlens": cu_seqlens}
    slots = list(range(1, N + 1))
    if mode == "prefill":  # the first chunk of some prompts, the next chunk of others
        continues = [n % 2 == 0 for n in range(N)]
        batch = KDABatch.prefill([T // N] * N, slots, has_initial_state=continues, num_tokens=T)
    elif mode == "decode":
        batch = KDABatch.decode(slots)
    elif mode == "speculative":
        pairs = torch.arange(1, 2 * N + 1, dtype=torch.int32).view(N, 2)
        lengths, accepted = [2 - n % 2 for n in range(N)], [1 + n % 2 for n in range(N)]
        batch = KDABatch.decode(pairs, lengths=lengths, num_accepted=accepted)
    else:
        decodes, prefills = ((4, 4), (5, 5), (3, 7))[size]
        batch = mixed_batch(T, decodes, tuple(range(31, 31 + prefills)))
    return {
        "hidden_states": x[:, : batch.num_tokens],
        "state": make_state(layer, num_spec=1 if mode == "speculative" else 0),
        "batch": batch,
    }


def check_call(call: Callable[..., Any], layer: KimiDeltaAttention, inputs: dict[str, Any]) -> None:
    """Output and states of a compiled call against the eager layer and fp64."""
    eager, exact = dict(inputs), {**inputs, "hidden_states": inputs["hidden_states"].double()}
    if "state" in inputs:
        eager["state"] = clone_state(inputs["state"])
        exact["state"] = tuple(x.double() for x in inputs["state"])
    out, reference = call(**inputs), layer(**eager)
    assert_close(out, reference, in_fp64(layer)(**exact))
    if "state" in inputs:
        for states in zip(inputs["state"], eager["state"], exact["state"], strict=True):
            assert_close(*states, operand_dtype=BF16)


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def check_one_graph(mode: str, layout: str | None, gate: str, backend: str) -> None:
    """One graph for all sizes, without a break."""
    layer = make_layer(BF16, conv_layout=layout, **GATES[gate])
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    check_call(compiled, layer, mode_arguments(mode, layer, 0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (1, 2):
            check_call(compiled, layer, mode_arguments(mode, layer, size))
    assert graphs_and_breaks() == (1, 0)


# Graphs, breaks and recompilations are decided before the backend; it is Inductor in every mode and
# layout once, and the short way without code generation elsewhere.


@pytest.mark.parametrize(
    ("mode", "gate", "backend"),
    [
        ("one", "softplus", "inductor"),
        ("one", "bounded", "aot_eager"),
        ("batch", "softplus", "aot_eager"),
        ("batch", "bounded", "inductor"),
        ("varlen", "softplus", "inductor"),
        ("varlen", "bounded", "aot_eager"),
    ],
)
def test_one_dynamic_graph(mode: str, gate: str, backend: str) -> None:
    check_one_graph(mode, None, gate, backend)


@pytest.mark.parametrize(
    ("mode", "layout", "gate", "backend"),
    [
        ("prefill", "SD", "softplus", "inductor"),
        ("prefill", "SD", "bounded", "aot_eager"),
        ("prefill", "DS", "softplus", "aot_eager"),
        ("prefill", "DS", "bounded", "aot_eager"),
        ("decode", "SD", "softplus", "aot_eager"),
        ("decode", "SD", "bounded", "aot_eager"),
        ("decode", "DS", "softplus", "aot_eager"),
        ("decode", "DS", "bounded", "inductor"),
        ("speculative", "SD", "bounded", "aot_eager"),
        ("speculative", "DS", "softplus", "inductor"),
        ("mixed", "SD", "softplus", "inductor"),
        ("mixed", "SD", "bounded", "aot_eager"),
        ("mixed", "DS", "softplus", "aot_eager"),
        ("mixed", "DS", "bounded", "inductor"),
    ],
)
def test_one_dynamic_graph_on_pages(mode: str, layout: str, gate: str, backend: str) -> None:
    check_one_graph(mode, layout, gate, backend)


@pytest.mark.parametrize("mode", ["one", "batch", "varlen", "prefill", "decode", "mixed"])
def test_lengths_become_dynamic_automatically(mode: str) -> None:
    """With `torch.compile`'s defaults: one static graph, one dynamic, no more; with a server's
    batch the dynamic one alone.
    """
    layer = make_layer(BF16)
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (0, 1):
        check_call(compiled, layer, mode_arguments(mode, layer, size))
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_call(compiled, layer, mode_arguments(mode, layer, 2))
    assert graphs_and_breaks() == (1 if mode in ("prefill", "decode", "mixed") else 2, 0)


def test_three_graphs_serve_everything() -> None:
    """Decode, prefill and mixed: only which row counts are zero matters."""
    layer = make_layer(BF16)
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for mode in ("decode", "prefill", "mixed"):
        check_call(compiled, layer, mode_arguments(mode, layer, 0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, mode in ((1, "mixed"), (2, "decode"), (1, "prefill"), (2, "mixed")):
            check_call(compiled, layer, mode_arguments(mode, layer, size))
    assert graphs_and_breaks() == (3, 0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_layout
def test_no_copy_of_the_states(layout: str, dynamic: bool) -> None:
    """In the code for a GPU: one graph whose kernels read and write the pages directly."""
    layer = make_layer(BF16, conv_layout=layout)
    sources: list[str] = []

    def call(**inputs: Any) -> Tensor:
        counters.clear()
        out, found = cuda_code(layer, dynamic=dynamic, **inputs)
        sources.extend(found)
        return out

    check_call(call, layer, mode_arguments("mixed", layer, 0))
    (source,) = sources
    assert graphs_and_breaks() == (1, 0)
    body = source[source.index("def call(") :]
    names = [str(SLOTS)]  # and with dynamic shapes, the symbol of the graph input that is 23
    for argument in re.findall(rf"^ *(\w+) = {SLOTS}$", source, re.M):
        names += re.findall(rf"^ *(s\d+) = {argument}$", source, re.M)
    assert len(names) == (2 if dynamic else 1)
    sizes = re.findall(r"empty_strided_cuda\(\(([^()]*)", body)
    assert len(sizes) > 10
    assert [size for size in sizes if re.match(rf"({'|'.join(names)})\b", size)] == []
    found = summary(source)
    assert [name for name in found.launches if name.endswith("_kernel")]
    assert {name.rpartition(".")[2] for name in found.externs} == {"mm", "addmm"}


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_code_for_a_gpu(mode: str) -> None:
    """What the generated kernels and the hand-written ones compute together."""
    layer = KimiDeltaAttention(HIDDEN, 16, 2, dtype=BF16).requires_grad_(False)
    inputs = mode_arguments(mode, layer, 0)
    if mode == "prefill":
        batch = KDABatch.prefill([70, 3], [2, 1], has_initial_state=[True, False])
        inputs |= {"hidden_states": inputs["hidden_states"][:, :73], "batch": batch}
    check_call(lambda **inputs: cuda_code(layer, load=load, **inputs)[0], layer, inputs)


def test_layout_is_a_constant_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of `config.conv_layout` recompiles once and gives the right answer."""
    layer = make_layer(BF16)
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True)
    for n, layout in enumerate(["SD", "DS", "SD"]):
        monkeypatch.setattr(config, "conv_layout", layout)
        inputs = mode_arguments("decode", layer, 0)
        assert inputs["state"][0].shape == ((SLOTS, 3, 192) if layout == "SD" else (SLOTS, 192, 3))
        check_call(compiled, layer, inputs)
        assert graphs_and_breaks() == (min(n + 1, 2), 0)


def test_layers_of_one_allocation_share_a_graph() -> None:
    """Several layers in one graph, each with its slice of the states of all."""

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(make_layer(BF16) for _ in range(2))

        def forward(self, x: Tensor, conv: Tensor, recurrent: Tensor, batch: KDABatch) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = x + layer(x, state=(conv[i], recurrent[i]), batch=batch)
            return x

    stack = Stack()
    conv, recurrent = stack.layers[0].state_spec().allocate(SLOTS, layers=2)
    twins = conv.clone(), recurrent.clone()
    batch = KDABatch.prefill([70, 33], [4, 2])
    x = torch.randn(1, 103, HIDDEN, dtype=BF16)
    expected = stack(x, *twins, batch)
    out, (source,) = run_and_get_code(
        torch.compile(stack, fullgraph=True), x, conv, recurrent, batch
    )
    exact = copy.deepcopy(stack).double()(
        x.double(), *(torch.zeros_like(t).double() for t in twins), batch
    )
    assert_close(out, expected, exact)
    for i in range(2):
        assert conv[i, [2, 4]].any()
        assert recurrent[i, [2, 4]].any()
    assert "empty_strided_cpu((2, 23, " not in source
    assert "empty_strided_cpu((23, " not in source


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2, got 3"),
        ({"expand_v": 1.01}, r"expand_v must make .* an integer, got 1.01"),
        ({"mode": "fast"}, "mode must be one of chunk, fused_recurrent, got 'fast'"),
        ({"conv_size": 1}, "conv_size must be at least 2, got 1"),
        ({"safe_gate": True}, "lower_bound must be given with safe_gate, got None"),
        ({"lower_bound": -6.0}, r"lower_bound must be None or in \[-5, 0\), got -6.0"),
        ({"conv_layout": "XY"}, "layout must be one of SD, DS, auto, got 'XY'"),
        ({"forget_gate_rank": 0}, "forget_gate_rank must be a positive number, .* got 0"),
        ({"output_gate_rank": "full"}, "output_gate_rank must be .* got 'full'"),
        ({"head_dim": 257}, r"head_dim must be in \[1, 256\], got 257"),
        ({"expand_v": 16}, r"head_dim \* expand_v must be in \[1, 256\], got 512"),
        ({"norm_eps": -1e-5}, "norm_eps must not be negative, got -1e-05"),
        ({"norm_eps": math.nan}, "norm_eps must not be negative, got nan"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KimiDeltaAttention(
            **{"hidden_size": HIDDEN, "head_dim": HEAD_DIM, "num_heads": HEADS, **options}
        )


def test_hidden_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        KimiDeltaAttention(0, HEAD_DIM, HEADS)


def test_forward_errors_write_nothing() -> None:
    layer = make_layer()
    state = make_state(layer)
    before = clone_state(state)
    x = torch.randn(1, 2, HIDDEN)
    one, two = KDABatch.decode([1]), KDABatch.decode([1, 2])
    conv, recurrent = state
    short = make_state(layer, slots=5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"hidden_states": x[0]}, "hidden_states must have 3 dimensions, got shape (2, 64)"),
        ({"hidden_states": x[..., :5]}, "hidden_states must have shape [1, 2, 64], got (1, 2, 5)"),
        ({"state": state}, "batch must be given with state, got None"),
        ({"batch": two}, "state must be given with batch, got None"),
        (
            {"chunk_indices": torch.zeros(1, 2, dtype=torch.int32)},
            "chunk_indices must come with cu_seqlens",
        ),
        (
            {"state": state, "batch": one},
            "hidden_states must have shape [1, 1, 64], got (1, 2, 64)",
        ),
        (
            {"state": state, "batch": two, "cu_seqlens": torch.tensor([0, 2])},
            "cu_seqlens must be None with batch, which has its own",
        ),
        (
            {"hidden_states": x.expand(2, 2, -1), "cu_seqlens": torch.tensor([0, 2])},
            "hidden_states must have batch size 1 with cu_seqlens, got 2",
        ),
        (
            {"state": (None, recurrent), "batch": two},
            "conv must be a tensor, got NoneType",
        ),
        (
            {"state": (conv.transpose(1, 2), recurrent), "batch": two},
            "conv must have shape [23, 192, 192], got (23, 192, 3)",
        ),
        (
            {"state": (conv, short[1]), "batch": two},
            "conv must have shape [5, 3, 192], got (23, 3, 192)",
        ),
        (
            {"state": (conv, recurrent[:, :1]), "batch": two},
            "recurrent must have shape [23, 2, 32, 32], got (23, 1, 32, 32)",
        ),
        (
            {"state": (conv, recurrent.half()), "batch": two},
            "recurrent must have dtype bfloat16, float32, float64, got float16",
        ),
        (
            {"state": (conv, recurrent[0]), "batch": two},
            "recurrent must have 4 dimensions, got shape (2, 32, 32)",
        ),
        (
            {"state": state, "batch": KDABatch.decode([[1, 3], [2, 4]])},
            "conv must have a state length of at least 4, got 3",
        ),
        (
            {"state": short, "batch": KDABatch.decode([1, 5])},
            "state_indices must be below 5, got 5",
        ),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(**{"hidden_states": x, **arguments})
    for now, then in zip(state, before, strict=True):
        assert torch.equal(now, then)


def test_batch_errors() -> None:
    good = {
        "cu_seqlens": torch.tensor([0, 1, 5]),
        "state_indices": torch.tensor([3, 4]),
        "has_initial_state": torch.tensor([True, False]),
        "num_decodes": 1,
        "num_decode_tokens": 1,
        "num_prefills": 1,
        "num_prefill_tokens": 4,
        "num_tokens": 6,
    }
    assert KDABatch(**good).chunk_indices.tolist() == [[0, 0]]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_decodes": -1}, "num_decodes must not be negative, got -1"),
        (
            {"num_decodes": 0, "num_prefills": 0},
            "num_decodes + num_prefills must be at least 1, got 0",
        ),
        ({"num_tokens": 4}, "num_tokens must be at least 5, got 4"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must have shape [3], got (2,)"),
        ({"cu_seqlens": torch.tensor([0.0, 1, 5])}, "cu_seqlens must have dtype int32, int64"),
        ({"cu_seqlens": torch.tensor([0, 2, 1])}, "cu_seqlens must not decrease, got 2 then 1"),
        (
            {"cu_seqlens": torch.tensor([0, 1, 6])},
            "cu_seqlens must end at or before 5 tokens, got 6",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 0, 5])},
            "cu_seqlens must start the prefills at num_decode_tokens = 1, got 0",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5]), "num_decode_tokens": 2},
            "cu_seqlens must give each decode at most 1 tokens, one per column of state_indices, "
            "got 2",
        ),
        (
            {"state_indices": torch.tensor([3])},
            "state_indices must have shape [2] or [2, 1 + num_spec], got (1,)",
        ),
        (
            {"state_indices": torch.tensor([3.0, 4.0])},
            "state_indices must have dtype int32, int64, got float32",
        ),
        (
            {"state_indices": torch.tensor([3, 3])},
            "state_indices must not share a slot between sequences, got slot 3 for",
        ),
        (
            {"has_initial_state": torch.tensor([1, 0])},
            "has_initial_state must have dtype bool, got int64",
        ),
        (
            {"has_initial_state": torch.tensor([True])},
            "has_initial_state must have shape [2], got (1,)",
        ),
        ({"num_accepted": torch.tensor([1, 1])}, "num_accepted must have shape [1], got (2,)"),
        (
            {"num_accepted": torch.tensor([1])},
            "num_accepted must come with state_indices of shape [N, 1 + num_spec], got (2,)",
        ),
        (
            {"num_accepted": torch.tensor([2]), "state_indices": torch.tensor([[3], [4]])},
            "num_accepted must be in [1, 1], got 2",
        ),
        (
            {"prefill_cu_seqlens": torch.tensor([0.0, 4.0])},
            "prefill_cu_seqlens must have dtype int32, int64, got float32",
        ),
        (
            {"prefill_cu_seqlens": torch.tensor([0, 2, 4])},
            "prefill_cu_seqlens must have shape [2], got (3,)",
        ),
        (
            {"prefill_cu_seqlens": torch.tensor([0, 3])},
            "prefill_cu_seqlens must be the prefills' part of cu_seqlens, [0, 4], got [0, 3]",
        ),
        (
            {"chunk_indices": torch.tensor([[0, 0]])},
            "chunk_indices must have dtype int32, got int64",
        ),
        (
            {"chunk_indices": torch.zeros(2, 2, dtype=torch.int32)},
            "chunk_indices must have shape [1, 2], got (2, 2)",
        ),
        (
            {"chunk_indices": torch.tensor([[0, 1]], dtype=torch.int32)},
            "chunk_indices must be the chunk table of cu_seqlens, expected row 0 to be [0, 0], "
            "got [0, 1]",
        ),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            KDABatch(**{**good, **change})
    with pytest.raises(ValueError, match="lengths must not be negative, got -2 for sequence 1"):
        KDABatch.mixed([1], [-2], [3, 4])
    with pytest.raises(
        ValueError, match=re.escape("has_initial_state must have shape [1], got (2,)")
    ):
        KDABatch.prefill([5], [1], has_initial_state=[True, False])
