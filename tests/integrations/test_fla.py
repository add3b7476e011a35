"""flash-linear-attention's functions, methods and layer, computed by our operators on a CPU."""

import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kda_ops import KimiDeltaAttention as OurLayer
from kda_ops.integrations import fla as integration
from kda_ops.integrations.fla import patch, register_backend, unpatch
from tests.support import fla_layers
from tests.support.fake_cuda import cuda_code, summary
from tests.support.fla_layers import Cache, FusedRMSNormGated, KimiDeltaAttention, ShortConvolution
from tests.support.launches import PREFILL_UNPACKED, SAVING
from tests.support.oracle import assert_close

PAGE = Path(__file__).parents[2] / "docs" / "integrations-fla.md"
FUNCTIONS = {
    "chunk_kda": "fla.ops.kda.chunk",
    "fused_recurrent_kda": "fla.ops.kda.fused_recurrent",
    "fused_recurrent_kda_fwd": "fla.ops.kda.fused_recurrent",
    "fused_kda_gate": "fla.ops.kda.gate",
    "kda_gate_chunk_cumsum": "fla.ops.kda.gate",
    "l2norm": "fla.modules.norm.l2norm",
    "causal_conv1d": "fla.modules.causal_conv1d.ops",
    "causal_conv1d_update": "fla.modules.causal_conv1d.ops",
    "unpad_hidden_states": "fla.layers.utils",
    "repad_hidden_states": "fla.layers.utils",
}
METHODS = {
    "short_convolution_forward": ShortConvolution.forward,
    "short_convolution_step": ShortConvolution.step,
    "fused_rms_norm_gated_forward": FusedRMSNormGated.forward,
}
B, T, H, HV, K, V, HIDDEN = 2, 70, 2, 4, 16, 8, 32


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    patch()
    yield
    unpatch()


def assert_same(found: Tensor | None, expected: Tensor) -> None:
    """Two computations in fp64 agree to fp32 precision."""
    assert found is not None
    assert found.dtype == expected.dtype == torch.float64
    assert_close(found.float(), expected.float(), expected)


# ---------------------------------------------------------------------- patching


def test_signatures_are_theirs() -> None:
    unpatch()
    pairs = [
        (getattr(importlib.import_module(place), name), getattr(integration, name))
        for name, place in FUNCTIONS.items()
    ]
    pairs += [(theirs, getattr(integration, name)) for name, theirs in METHODS.items()]
    for theirs, ours in pairs:
        assert theirs is not ours
        found, expected = (
            [(x.name, x.kind, x.default) for x in inspect.signature(f).parameters.values()]
            for f in (ours, theirs)
        )
        assert found == expected, ours


def test_unpatch_leaves_no_trace() -> None:
    unpatch()
    before = fla_layers.names()
    patch()
    patch()
    during = fla_layers.names()
    ours = {id(getattr(integration, name)) for name in [*FUNCTIONS, *METHODS]}
    assert {id(x) for x in during.values()} >= ours
    for name in FUNCTIONS:
        if "hidden_states" not in name:
            functions = [y for (_, x), y in during.items() if x == name and inspect.isfunction(y)]
            assert functions
            assert {id(y) for y in functions} <= ours
    unpatch()
    unpatch()
    assert fla_layers.names() == before


# ---------------------------------------------------------------------- the recurrence

LENGTHS = [1, 66, 0, 13]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"use_qk_l2norm_in_kernel": True},
    "gate": {"use_gate_in_kernel": True},
    "sigmoid": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
    "all": {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "lower_bound": -5.0,
    },
}


def raw_inputs(variant: dict[str, Any], lengths: list[int] | None) -> dict[str, Tensor]:
    """Arguments in fp64 whose gates stay near 1 and whose keys have a norm below 1."""
    rows = (B, T) if lengths is None else (1, sum(lengths))
    N = B if lengths is None else len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    q, k = normal(*rows, H, K), F.normalize(normal(*rows, H, K), dim=-1)
    g, beta = normal(*rows, HV, K), normal(*rows, HV)
    inputs = {"q": q, "k": k, "v": normal(*rows, HV, V), "g": g, "beta": beta}
    if "use_gate_in_kernel" in variant:
        inputs |= {"A_log": normal(HV), "dt_bias": normal(HV * K) - 2}
    else:
        inputs["g"] = -F.softplus(g) / 4
    if "use_beta_sigmoid_in_kernel" not in variant:
        inputs["beta"] = torch.sigmoid(beta)
    return inputs | {"initial_state": normal(N, HV, K, V)}


def expected_of(
    inputs: dict[str, Tensor], variant: dict[str, Any], lengths: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`o`, the final states and the states after each token, by the definition."""
    q, k, v, g, beta, state = (inputs[x] for x in ("q", "k", "v", "g", "beta", "initial_state"))
    if "use_qk_l2norm_in_kernel" in variant:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if "use_gate_in_kernel" in variant:
        bound = variant.get("lower_bound")
        g = fla_layers.gate(g, inputs["A_log"], inputs["dt_bias"], bound)
    if "use_beta_sigmoid_in_kernel" in variant:
        beta = torch.sigmoid(beta) * (2 if "allow_neg_eigval" in variant else 1)
    if lengths is None:
        o, states = fla_layers.recurrence(q, k, v, g, beta, state)
        return o, states[:, -1], states
    outputs, finals, all_states = [], [], []
    for n, parts in enumerate(zip(*(x.split(lengths, 1) for x in (q, k, v, g, beta)), strict=True)):
        if parts[0].shape[1] == 0:
            finals.append(state[n])
            continue
        o, states = fla_layers.recurrence(*parts, state[n : n + 1])
        outputs.append(o)
        finals.append(states[0, -1])
        all_states.append(states)
    return torch.cat(outputs, 1), torch.stack(finals), torch.cat(all_states, 1)


def offsets(lengths: list[int] | None) -> dict[str, Tensor]:
    if lengths is None:
        return {}
    return {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "varlen"])
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_recurrence(
    name: str, variant: dict[str, Any], v_first: bool, lengths: list[int] | None
) -> None:
    """With and without autograd, and the gradient of every argument."""
    inputs = raw_inputs(variant, lengths)
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    o, final, _ = expected_of(leaves, variant, lengths)
    weights = torch.randn_like(o), torch.randn_like(final)
    ((o * weights[0]).sum() + (final * weights[1]).sum()).backward()
    expected = {key: x.grad for key, x in leaves.items()}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state = inputs["initial_state"]
        arguments = inputs | {"initial_state": state.mT if v_first else state}
        found, new = getattr(integration, name)(
            **arguments, **variant, **offsets(lengths), output_final_state=True,
            state_v_first=v_first,
        )  # fmt: skip
        return found, new.mT if v_first else new

    leaves = {key: x.detach().clone().requires_grad_() for key, x in inputs.items()}
    found = call(leaves)
    assert_same(found[0].detach(), o.detach())
    assert_same(found[1].detach(), final.detach())
    sum((x * weight).sum() for x, weight in zip(found, weights, strict=True)).backward()
    for key, x in leaves.items():
        assert_same(x.grad, expected[key])
    with torch.no_grad():
        found = call(leaves)
    assert_same(found[0], o.detach())
    assert_same(found[1], final.detach())


def test_states_in_place() -> None:
    """`fused_recurrent_kda_fwd` by default, and on pages, of which page 0 is one."""
    inputs = raw_inputs({}, [1, 1, 1])
    cu_seqlens = offsets([1, 1, 1])
    o, final, _ = expected_of(inputs, {}, [1, 1, 1])
    state = inputs.pop("initial_state")
    whole = state.clone()
    found, same = integration.fused_recurrent_kda_fwd(**inputs, initial_state=whole, **cu_seqlens)
    assert same is whole
    assert_same(found, o)
    assert_same(whole, final)
    pages = torch.randn(6, HV, K, V, dtype=torch.float64)
    table = torch.tensor([4, 0, 2])
    pages[table] = state
    old, out = pages.clone(), torch.empty_like(o)
    found, same = integration.fused_recurrent_kda_fwd(
        **inputs, initial_state=pages, **cu_seqlens, ssm_state_indices=table, out=out
    )
    assert found is out
    assert same is pages
    assert_same(out, o)
    assert_same(pages[table], final)
    assert torch.equal(pages[[1, 3, 5]], old[[1, 3, 5]])


def test_speculative_states() -> None:
    """A page for the state after each token, after some of the last ones were accepted."""
    lengths, columns = [2, 3, 1], 3
    inputs = raw_inputs({}, lengths)
    o, _, states = expected_of(inputs, {}, lengths)
    first = inputs.pop("initial_state")
    accepted = torch.tensor([1, 3, 2])
    table = torch.randperm(len(lengths) * columns).view(len(lengths), columns)
    pages = torch.randn(table.numel() + 2, HV, K, V, dtype=torch.float64)
    pages[table[torch.arange(3), accepted - 1]] = first
    old = pages.clone()
    found, _ = integration.fused_recurrent_kda_fwd(
        **inputs, initial_state=pages, **offsets(lengths), ssm_state_indices=table,
        num_accepted_tokens=accepted,
    )  # fmt: skip
    assert_same(found, o)
    written = torch.cat([table[n, :length] for n, length in enumerate(lengths)])
    assert_same(pages[written], states[0])
    others = [page for page in range(len(pages)) if page not in written]
    assert torch.equal(pages[others], old[others])


# ---------------------------------------------------------------------- gate and norms


@pytest.mark.parametrize("bound", [None, -3.0])
def test_gate(bound: float | None) -> None:
    g, A_log, dt_bias = torch.randn(1, 80, HV, K), torch.randn(HV), torch.randn(HV * K)
    exact = fla_layers.gate(g.double(), A_log.double(), dt_bias.double(), bound)
    low = fla_layers.gate(g, A_log, dt_bias, bound)
    assert_close(integration.fused_kda_gate(g, A_log, dt_bias, bound), low, exact)
    half = integration.fused_kda_gate(g, A_log, dt_bias, bound, torch.bfloat16)
    assert_close(half, low.bfloat16(), exact)
    for scale in (None, 2.0):
        pieces = [
            [x.cumsum(1) * (scale or 1) for x in y.split([64, 3, 13], 1)] for y in (low, exact)
        ]
        sums = integration.kda_gate_chunk_cumsum(
            g, A_log, 64, scale, dt_bias, torch.tensor([0, 67, 80]), lower_bound=bound
        )
        assert_close(sums, *(torch.cat(x, 1) for x in pieces))


def test_l2norm() -> None:
    def norm(x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 0.5).sqrt()

    x = torch.randn(3, 5, K).bfloat16()
    low, exact = norm(x.float()), norm(x.double())
    assert_close(integration.l2norm(x, 0.5), low.bfloat16(), exact)
    assert_close(integration.l2norm(x, 0.5, torch.float32), low, exact)


@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_gated_norm(activation: str, affine: bool, with_residual: bool) -> None:
    module = FusedRMSNormGated(V, affine, activation=activation)
    if affine:
        torch.nn.init.normal_(module.weight)
    x, g = torch.randn(2, B, T, HV, V).bfloat16()
    residual = torch.randn(B, T, HV, V) if with_residual else None

    def define(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
        y = total / (total.square().mean(-1, keepdim=True) + module.eps).sqrt()
        y = y * module.weight.detach().to(dtype) if affine else y
        gated = torch.sigmoid(g.to(dtype)) * (1 if activation == "sigmoid" else g.to(dtype))
        return y * gated, total

    (low, _), (exact, total) = define(torch.float32), define(torch.float64)
    with torch.no_grad():
        assert_close(module(x, g, residual), low.bfloat16(), exact)
        y, kept = module(x, g, residual, prenorm=True, residual_in_fp32=True)
        assert_close(y, low.bfloat16(), exact)
        assert_close(kept, total.float(), total)
        _, kept = module(x, g, residual, prenorm=True)
        assert kept.dtype == (torch.bfloat16 if residual is None else torch.float32)


# ---------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("with_state", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize("lengths", [None, [1, 2, 0, 9, 30]], ids=["dense", "varlen"])
@pytest.mark.parametrize("activation", [None, "swish"])
def test_convolution(activation: str | None, lengths: list[int] | None, with_state: bool) -> None:
    """Results, states and gradients; rows after the last sequence are padding."""
    D, W, padding = 6, 4, 0 if lengths is None else 3
    rows = [T, T] if lengths is None else [*lengths, padding]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    N = B if lengths is None else len(lengths)
    x, residual = (normal(1, sum(rows), D) for _ in range(2))
    leaves = {"x": x, "weight": normal(D, W), "bias": normal(D), "residual": residual}
    if with_state:
        leaves["initial_state"] = normal(N, D, W)
    state = leaves.get("initial_state")
    pieces = [
        fla_layers.convolution(
            part, leaves["weight"], leaves["bias"], None if state is None else state[n], activation
        )
        for n, part in enumerate(x[0].split(rows)[:N])
    ]
    y = torch.cat([y for y, _ in pieces])
    y = y + residual[0, : len(y)]
    final = torch.stack([last for _, last in pieces])
    weights = torch.randn_like(y), torch.randn_like(final)
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    arguments = dict(copies)
    if lengths is None:
        arguments |= {name: copies[name].view(B, T, D) for name in ("x", "residual")}
    found, last = integration.causal_conv1d(
        **arguments, activation=activation, output_final_state=True, **offsets(lengths)
    )
    found = found.reshape(-1, D)[: len(y)]
    assert_same(found.detach(), y.detach())
    assert_same(last.detach(), final.detach())
    ((found * weights[0]).sum() + (last * weights[1]).sum()).backward()
    for name, leaf in copies.items():
        assert_same(leaf.grad, leaves[name].grad)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_one_token_of_each_writes_the_cache(packed: bool) -> None:
    module = ShortConvolution(6, 4, bias=True, dtype=torch.float64).requires_grad_(False)
    x, residual = torch.randn(2, 3, 1, 6, dtype=torch.float64)
    cache = torch.randn(3, 6, 4, dtype=torch.float64)
    weight = module.weight[:, 0]
    pieces = [
        fla_layers.convolution(row, weight, module.bias, state, "silu")
        for row, state in zip(x, cache, strict=True)
    ]
    y = torch.stack([y for y, _ in pieces]) + residual
    states = torch.stack([last for _, last in pieces])
    if packed:
        x, residual, y = (t.transpose(0, 1) for t in (x, residual, y))
    how = offsets([1, 1, 1]) if packed else {}
    calls = [
        lambda c: module(x, residual, cache=c, output_final_state=True, **how),
        lambda c: module.step(x, residual, c, True, **how),
        lambda c: integration.causal_conv1d_update(x, c, residual, weight, module.bias, "silu"),
    ]
    with torch.no_grad():
        for call in calls:
            written = cache.clone()
            found, last = call(written)
            assert_same(found, y)
            assert_same(last, states)
            assert_same(written, states)
        if packed:  # as many tokens as sequences, but not one of each
            written = cache.clone()
            module(x, cache=written, output_final_state=True, **offsets([2, 0, 1]))
            assert torch.equal(written, cache)
        assert module(x, cache=cache.clone(), **how)[1] is None
    written = cache.clone()
    module(x, cache=written, output_final_state=True, **how)
    assert torch.equal(written, cache)  # autograd needs the old one


def test_a_mask_of_a_convolution() -> None:
    module, x = ShortConvolution(6, 4), torch.randn(2, 9, 6)
    mask, before = torch.ones(2, 9), x.clone()
    mask[0, :4] = 0
    with torch.no_grad():
        found = module(x, mask=mask)[0]
        assert torch.equal(found[0, 4:], module(x[:1, 4:])[0][0])
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="mask must be None with cu_seqlens"):
        module(x[:1], mask=mask[:1], **offsets([9]))


# ---------------------------------------------------------------------- the layer


def make_layer(**options: Any) -> KimiDeltaAttention:
    layer = KimiDeltaAttention(HIDDEN, 1, K, H, HV, layer_idx=0, **options)
    torch.nn.init.normal_(layer.o_norm.weight, 1.0, 0.2)
    return layer.eval()


def in_pieces(call: Any, x: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    """With FLA's cache, piece by piece."""
    cache, pieces, end = Cache(), [], 0
    for piece in x.tensor_split(cuts, dim=1):
        end += piece.shape[1]
        masked = None if mask is None else mask[:, :end]
        pieces.append(call(piece, masked, past_key_values=cache, use_cache=True)[0])
    return torch.cat(pieces, dim=1)


LAYERS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "bounded": {"safe_gate": True, "lower_bound": -5.0, "allow_neg_eigval": True},
    "bias": {"conv_bias": True, "mode": "fused_recurrent"},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_ours(options: dict[str, Any]) -> None:
    """Against our layer with the same weights: results, and the gradient of each parameter."""
    theirs = make_layer(**options)
    known = {x: options[x] for x in options if x in ("lower_bound", "allow_neg_eigval")}
    ours = OurLayer(
        HIDDEN, K, H, num_v_heads=HV, conv_bias="conv_bias" in options, output_gate_bias=True,
        **known,
    )  # fmt: skip
    ours.load_checkpoint(theirs.state_dict())
    exact = copy.deepcopy(ours).double()
    x = torch.randn(B, T, HIDDEN)
    with torch.no_grad():
        reference, fp64 = ours(x), exact(x.double())
        for part in (x, x[:, :30]):  # FLA computes short ones token by token
            t = part.shape[1]
            assert_close(theirs(part)[0], reference[:, :t], fp64[:, :t])
        for cuts in ([1, 2, 67], [66, 67, 68]):
            assert_close(in_pieces(theirs, x, cuts), reference, fp64)
    theirs.train()
    weights = torch.randn(B, T, HIDDEN)
    (theirs(x)[0] * weights).sum().backward()
    (ours(x) * weights).sum().backward()
    (exact(x.double()) * weights.double()).sum().backward()
    found = copy.deepcopy(ours)  # whose parameters are their gradients, packed as ours are
    found.load_checkpoint({name: p.grad for name, p in theirs.named_parameters()})
    for name, gradient in found.named_parameters():
        expected = [layer.get_parameter(name).grad for layer in (ours, exact)]
        assert_close(gradient.detach(), *expected)


def masks(side: str) -> Tensor:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    """Padded tokens change nothing and give zeros; also of a row that is nothing but padding."""
    layer, x, mask = make_layer(), torch.randn(B, T, HIDDEN), masks(side)
    real = mask[0].bool()

    def apart(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:1, real])[0][0], layer(x[1:])[0][0]])

    with torch.no_grad():
        expected = apart(layer, x), apart(copy.deepcopy(layer).double(), x.double())
        for found in (layer(x, mask)[0], in_pieces(layer, x, [40, 68, 69], mask)):
            assert_close(found[mask.bool()], *expected)
            assert (found[~mask.bool()] == 0).all()
        mask[0] = 0
        found = layer(x, mask)[0]
        assert (found[0] == 0).all()
        assert_close(found[1], layer(x[1:])[0][0], expected[1][-T:])


# ---------------------------------------------------------------------- compiled


def test_one_graph_each() -> None:
    """No breaks: prefill, short prompts, padding, pieces with a cache, single tokens, training."""
    layer, x = make_layer(), torch.randn(B, T, HIDDEN)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for mask in (None, masks("left"), masks("right")):
            assert torch.equal(compiled(x, mask)[0], layer(x, mask)[0])
        assert counter.frame_count == 2
        assert torch.equal(compiled(x[:, :30])[0], layer(x[:, :30])[0])
        for mask in (None, masks("left")):
            torch._dynamo.reset()
            found = in_pieces(compiled, x, [66, 67, 68, 69], mask)
            assert torch.equal(found, in_pieces(layer, x, [66, 67, 68, 69], mask))
    torch._dynamo.reset()
    layer.train()
    gradients = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x, masks("left"))[0].sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for eager, found in zip(*gradients, strict=True):
        assert torch.equal(eager, found)


def test_inductor() -> None:
    """Numbers of a compiled step from FLA's cache; `test_the_page` compiles a prefill."""
    layer, x = make_layer(), torch.randn(B, 5, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True)

    def stepped(call: Any, x: Tensor) -> Tensor:
        cache = Cache()
        layer.to(x.dtype)(x[:, :4], past_key_values=cache, use_cache=True)
        y = call(x[:, 4:], past_key_values=cache, use_cache=True)[0]
        return torch.cat([y.flatten(), cache[0]["recurrent_state"].flatten()])

    with torch.no_grad():
        assert_close(stepped(compiled, x), stepped(layer, x), stepped(layer, x.double()))


def test_launches_of_a_prefill() -> None:
    """The code for a GPU: the launches of our own layer where q, k and v are not packed."""
    layer = KimiDeltaAttention(64, 1, 64, 2).bfloat16().eval()
    with torch.no_grad():
        _, (source,) = cuda_code(lambda x: layer(x)[0], torch.randn(B, T, 64).bfloat16())
    found = summary(source).launches
    assert len(found) == len(PREFILL_UNPACKED)
    for name, part in zip(found, PREFILL_UNPACKED, strict=True):
        assert part in name


def test_launches_of_a_training_step() -> None:
    """One convolution each way, the fused recurrence and its gradient, as in our own layer."""
    layer = KimiDeltaAttention(64, 1, 64, 2).bfloat16().train()
    x = torch.randn(B, T, 64).bfloat16().requires_grad_()
    _, sources = cuda_code(lambda x: layer(x)[0], x, backward=True)
    forward, backward = (summary(source).launches for source in sources)
    assert len(forward) == len(SAVING) + 1, forward  # taps are put together
    for name, part in zip(forward[1:], SAVING, strict=True):
        assert part in name
    assert backward.count("short_conv_backward_kernel") == 1
    assert len(backward) <= 17, backward


# ---------------------------------------------------------------------- refused


def test_what_is_refused() -> None:
    inputs = raw_inputs({}, None)
    inputs.pop("initial_state")
    for arguments, message in (
        ({"cp_context": object()}, "cp_context must be None"),
        ({"return_intermediate_states": True}, "return_intermediate_states must be False"),
        ({"chunk_size": 32}, "chunk_size must be 64"),
        ({"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel must be True"),
        ({"safe_gate": True, "use_gate_in_kernel": True}, "lower_bound must be given"),
        ({"state_v_first": True, "transpose_state_layout": True}, "must not both be given"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.chunk_kda(**inputs, **arguments)
    with pytest.raises(TypeError, match="unexpected arguments: layout"):
        integration.chunk_kda(**inputs, layout="SD")
    with pytest.raises(ValueError, match="chunk_size must be 64"):
        integration.kda_gate_chunk_cumsum(inputs["g"], torch.zeros(HV), 32)
    step = integration.fused_recurrent_kda_fwd
    with pytest.raises(ValueError, match="initial_state must be given"):
        step(**inputs)
    with pytest.raises(ValueError, match="inplace_final_state must be True"):
        step(**inputs, inplace_final_state=False, ssm_state_indices=torch.arange(B))
    with pytest.raises(ValueError, match="beta must have shape"):
        step(**inputs | {"beta": inputs["v"]}, inplace_final_state=False)
    x, weight = torch.randn(1, 5, 6), torch.randn(6, 4)
    with pytest.raises(ValueError, match="cp_context must be None"):
        integration.causal_conv1d(x, weight, cp_context=object())
    with pytest.raises(ValueError, match="weight must be given"):
        integration.causal_conv1d(x)
    with pytest.raises(ValueError, match="backend must be one of"):
        integration.causal_conv1d(x, weight, backend="other")


def test_the_older_name_of_a_layout() -> None:
    inputs = raw_inputs({}, None)
    state = inputs.pop("initial_state").mT.contiguous()
    for name in ("chunk_kda", "fused_recurrent_kda"):
        function = getattr(integration, name)
        found = function(**inputs, initial_state=state, transpose_state_layout=True)
        expected = function(**inputs, initial_state=state, state_v_first=True)
        assert torch.equal(found[0], expected[0])


# ---------------------------------------------------------------------- FLA's registry


@pytest.mark.parametrize("patched_first", [False, True])
def test_backend(patched_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLA's own functions then run here, but not what is refused."""
    if not patched_first:
        unpatch()
    with fla_layers.registered(register_backend, "kda_ops"):
        unpatch()
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        from fla.ops.kda.gate import fused_kda_gate

        inputs = raw_inputs({}, None)
        inputs.pop("initial_state")
        for function in (chunk_kda, fused_recurrent_kda):
            assert function is not getattr(integration, function.__name__)
            expected = getattr(integration, function.__name__)(**inputs)[0]
            assert torch.equal(function(**inputs)[0], expected)
        assert fused_kda_gate(inputs["g"], torch.zeros(HV)).shape == inputs["g"].shape
        with pytest.raises(RuntimeError, match="active driver"):
            chunk_kda(**inputs, chunk_size=32)
        monkeypatch.setenv("FLA_KDA_OPS", "0")
        with pytest.raises(RuntimeError, match="active driver"):
            chunk_kda(**inputs)


def test_the_page() -> None:
    """Its example runs."""
    unpatch()
    text = PAGE.read_text()
    start = text.index("```python\n") + len("```python\n")
    exec(compile(text[start : text.index("```\n", start)], PAGE.name, "exec"), {})
