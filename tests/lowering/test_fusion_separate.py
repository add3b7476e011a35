"""When separate convolutions of q, k and v become one operator, and when not."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.rewritten import Rewritten, rewritten

H, HV, K, V, W, T, SLOTS = 2, 4, 8, 16, 3, 3, 5
WIDTHS = (H * K, H * K, HV * V)
NAMES = ("x", "g", "beta", "z", "recurrent", "state_indices", "cu")
PER_PART = ("projection", "weight", "bias", "state")


class Prefill:
    """Three convolutions and the recurrence as a model author writes them; what a test changes is
    an attribute or a method.
    """

    update = False
    layout: str | None = None
    activations = ("silu", "silu", "silu")
    eps = (1e-6, 1e-6)

    def __call__(self, *args: Tensor) -> Any:
        a = dict(zip(NAMES, args, strict=False))
        parts = torch.utils._pytree.tree_unflatten(list(args[len(NAMES) :]), STRUCTURE)
        y = [
            self.convolve(i, x, *(parts[name][i] for name in PER_PART[1:]), a)
            for i, x in enumerate(self.inputs(a["x"], parts["projection"]))
        ]
        q, k, v = (part.unflatten(-1, (-1, V if i == 2 else K)) for i, part in enumerate(y))
        q, k = (self.normalize(part, eps) for part, eps in zip((q, k), self.eps, strict=True))
        return self.recur(q, k, v, a), self.extra(y, parts["state"])

    def inputs(self, x: Tensor, projections: Any) -> Any:
        """Slices of one projection."""
        return x.split(WIDTHS, dim=-1)

    def convolve(
        self, i: int, x: Tensor, weight: Tensor, bias: Any, state: Tensor, a: dict[str, Any]
    ) -> Tensor:
        options: dict[str, Any] = {"activation": self.activations[i], "cu_seqlens": a["cu"]}
        if self.update:
            options |= {"state_indices": a["state_indices"], "layout": self.layout or "SD"}
            return kda_ops.short_conv_update(x[0], state, weight, bias, **options)[None]
        if self.layout is not None:
            options |= {
                "conv_state": state,
                "state_indices": a["state_indices"],
                "layout": self.layout,
            }
        return kda_ops.short_conv(x, weight, bias, **options)

    def normalize(self, x: Tensor, eps: float) -> Tensor:
        return kda_ops.l2norm(x, eps=eps)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, a: dict[str, Any]) -> Tensor:
        G = -a["g"].to(a["recurrent"].dtype).abs()
        return kda_ops.chunk_kda(q, k, v, G, a["beta"], cu_seqlens=a["cu"])[0]

    def extra(self, y: Any, states: Any) -> Any:
        return None


class Step(Prefill):
    """The same in a decode step, up to the norm of its output."""

    update = True

    def recur(self, q: Tensor, k: Tensor, v: Tensor, a: dict[str, Any]) -> Tensor:
        g = kda_ops.gate(a["g"], None, lower_bound=-5.0)
        beta = torch.sigmoid(a["beta"])
        o = kda_ops.recurrent_kda(
            q, k, v, g, beta, a["recurrent"], a["state_indices"], cu_seqlens=a["cu"]
        )
        return kda_ops.rms_norm_gated(o, a["z"], a["z"].new_ones(V))


def inputs(layout: str = "SD", rows: int = W - 1, **changed: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16}

    def state(width: int) -> Tensor:
        return torch.randn(SLOTS, *((rows, width) if layout == "SD" else (width, rows)), **bf16)

    return {
        "x": torch.randn(1, T, sum(WIDTHS), **bf16),
        "g": torch.randn(1, T, HV, K, **bf16),
        "beta": torch.rand(1, T, HV, **bf16),
        "z": torch.randn(1, T, HV, V, **bf16),
        "recurrent": torch.randn(SLOTS, HV, V, K),
        "state_indices": torch.tensor([3, 1, 2]),
        "cu": torch.arange(T + 1, dtype=torch.int32),
        "projection": [torch.randn(sum(WIDTHS), n, **bf16) / 16 for n in WIDTHS],
        "weight": [torch.randn(n, W, **bf16) for n in WIDTHS],
        "bias": [torch.randn(n, **bf16) for n in WIDTHS],
        "state": [state(n) for n in WIDTHS],
        **changed,
    }


STRUCTURE = torch.utils._pytree.tree_structure({name: [0] * 3 for name in PER_PART})
DYNAMIC = {0: 1, 1: 1, 2: 1, 3: 1, 5: 0, 6: 0}  # tokens, sequences
WRITTEN = (4, *range(len(NAMES) + 9, len(NAMES) + 12))


def compiled(
    model: Any, dynamic: bool = False, written: tuple[int, ...] = WRITTEN, **changed: Any
) -> Rewritten:
    given = inputs(model.layout or "SD", **changed)
    flat = [given[name] for name in NAMES]
    flat += [x for name in PER_PART for x in given[name]]
    return rewritten(model, *flat, dynamic=DYNAMIC if dynamic else False, written=written)


def variant(base: type = Prefill, **attributes: Any) -> Any:
    """A model with other attributes or methods."""
    return type("Variant", (base,), attributes)()


def three_projections(self: Any, x: Tensor, projections: Any) -> Any:
    return [x @ projection for projection in projections]


def three_inputs(self: Any, x: Tensor, projections: Any) -> Any:
    return [(x + i) @ projection for i, projection in enumerate(projections)]


def no_biases(base: type) -> Any:
    convolve = base.convolve

    def without(self: Any, i: int, x: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Tensor:
        return convolve(self, i, x, weight, None, *rest)

    return without


forms = pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"layout": "SD", "inputs": three_projections},
        {"layout": "DS", "inputs": three_inputs, "activations": (None, None, None)},
        {"layout": "DS", "convolve": no_biases(Prefill)},
    ],
    ids=["slices", "SD-projections", "DS-inputs-linear", "DS-no-bias"],
)


@pytest.mark.parametrize("dynamic", [False, True])
@forms
def test_prefill_is_one_convolution(attributes: dict[str, Any], dynamic: bool) -> None:
    found = compiled(variant(**attributes), dynamic=dynamic)
    assert found.refused == []
    assert found.fired == ["separate_convs"]
    assert found.operators == ["short_conv_qkv", "chunk_kda"]
    assert found.copies == 0


@pytest.mark.parametrize("dynamic", [False, True])
@forms
def test_a_step_is_one_operator(attributes: dict[str, Any], dynamic: bool) -> None:
    found = compiled(variant(Step, **attributes), dynamic=dynamic)
    assert found.refused == []
    assert found.fired == ["kda_decode"]
    assert found.operators == ["kda_decode"]
    assert found.copies == 0


def of_channels(given: dict[str, Any], layout: str) -> tuple[Tensor, Any]:
    """One state, and how its channels are split."""
    axis = 2 if layout == "SD" else 1
    return torch.cat(given["state"], axis), lambda whole: whole.split(WIDTHS, axis)


def of_pages(given: dict[str, Any], layout: str) -> tuple[Tensor, Any]:
    """Pages with contiguous states, and some padding."""
    pages = torch.cat([*(state.flatten(1) for state in given["state"]), torch.zeros(SLOTS, 5)], 1)
    shapes = [state.shape[1:] for state in given["state"]]

    def parts(whole: Tensor) -> list[Tensor]:
        cut = whole.split([*(shape.numel() for shape in shapes), 5], 1)
        return [part.unflatten(1, shape) for part, shape in zip(cut, shapes, strict=False)]

    return pages.bfloat16(), parts


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("base", [Prefill, Step])
@pytest.mark.parametrize(
    ("layout", "packed"), [("SD", of_channels), ("DS", of_channels), ("SD", of_pages)]
)
def test_the_states_may_be_parts_of_one_tensor(
    base: type, layout: str, packed: Any, dynamic: bool
) -> None:
    """Each call writes its part of the whole that the previous call returned."""
    given = inputs(layout)
    whole, parts = packed(given, layout)

    def call(whole: Tensor, *args: Tensor) -> Any:
        return model(*args[:-3], *parts(whole))

    model = variant(base, layout=layout)
    flat = [given[name] for name in NAMES] + [x for name in PER_PART for x in given[name]]
    state_indices = {0: 0} if dynamic else False
    found = rewritten(call, whole, *flat, dynamic=state_indices, written=(0, 5))
    assert found.refused == []
    assert found.operators == (["kda_decode"] if base is Step else ["short_conv_qkv", "chunk_kda"])
    assert found.copies == 0


def scaled_state(base: type, part: int) -> Any:
    """One of the states is changed between the convolutions."""
    convolve = base.convolve

    def changed(self: Any, i: int, x: Tensor, *rest: Any) -> Tensor:
        *_, state, _ = rest
        if i == 2:
            self.states[part].mul_(0.5)
        self.states = [*(self.states if i else []), state]
        return convolve(self, i, x, *rest)

    return changed


def other_convolution(**options: Any) -> Any:
    """The convolution of k has other options."""

    def convolve(
        self: Any, i: int, x: Tensor, weight: Tensor, bias: Any, state: Tensor, a: dict[str, Any]
    ) -> Tensor:
        new = {name: option(a) for name, option in options.items()} if i == 1 else {}
        values = {"weight": weight, "bias": bias, "state": state, **a, **new}
        return Prefill.convolve(
            self, i, x, values["weight"], values["bias"], values["state"], values
        )

    return convolve


def without_state(
    self: Any, i: int, x: Tensor, weight: Tensor, bias: Any, state: Tensor, a: dict[str, Any]
) -> Tensor:
    """The convolution of k starts from zeros and writes no state."""
    if i == 1:
        return kda_ops.short_conv(x, weight, bias, cu_seqlens=a["cu"])
    return Prefill.convolve(self, i, x, weight, bias, state, a)


def in_fp32(self: Any, i: int, x: Tensor, *rest: Any) -> Tensor:
    """The convolution of v, rounded afterwards."""
    if i < 2 or x.dtype == torch.float64:
        return Prefill.convolve(self, i, x, *rest)
    return Prefill.convolve(self, i, x.float(), *rest).to(x.dtype)


def one_state(self: Any, i: int, x: Tensor, weight: Tensor, bias: Any, state: Any, a: Any) -> Any:
    self.first = state if i == 0 else self.first
    return Prefill.convolve(self, i, x, weight, bias, self.first if i < 2 else state, a)


@pytest.mark.parametrize("base", [Prefill, Step])
@pytest.mark.parametrize(
    "second",
    [
        lambda whole: whole[:-1, :, : H * K].view(SLOTS, W - 1, -1),
        lambda whole: whole[:-1, :, 4 : 4 + H * K],
        lambda whole: whole[1:, :, : H * K],
        lambda whole: whole.as_strided((SLOTS, W - 1, H * K), (whole.stride(0), H * K, 1)),
    ],
    ids=["same", "some-channels", "next-slot", "other-rows"],
)
def test_overlapping_states_stay(base: type, second: Any) -> None:
    """The convolution of k reads what that of q wrote."""
    given = inputs()
    whole = torch.randn(SLOTS + 1, W - 1, 2 * H * K, dtype=torch.bfloat16)

    def call(whole: Tensor, *args: Tensor) -> Any:
        return model(*args[:-3], whole[:-1, :, : H * K], second(whole), args[-1])

    model = variant(
        base, layout="SD", convolve=with_histories if base is Prefill else Step.convolve
    )
    flat = [given[name] for name in NAMES] + [x for name in PER_PART for x in given[name]]
    found = rewritten(call, whole, *flat, written=(0, 5))
    assert found.operators.count("short_conv_update" if base is Step else "short_conv") == 3
    assert any("parts of it in common" in why for _, why in found.refused)


def with_histories(
    self: Any, i: int, x: Tensor, weight: Tensor, bias: Any, state: Tensor, a: dict[str, Any]
) -> Tensor:
    """Which sequences have one is computed for each convolution, and is the same."""
    return kda_ops.short_conv(
        x,
        weight,
        bias,
        conv_state=state,
        state_indices=a["state_indices"],
        has_initial_state=a["state_indices"] > 0,
        cu_seqlens=a["cu"],
        layout=self.layout,
    )


def test_values_recomputed_per_convolution_are_equal() -> None:
    found = compiled(variant(convolve=with_histories, layout="DS"))
    assert found.operators == ["short_conv_qkv", "chunk_kda"]


def returns(index: int) -> Any:
    return lambda self, y, states: y[index] * 2


@pytest.mark.parametrize("base", [Prefill, Step])
@pytest.mark.parametrize(
    ("attributes", "changed", "reason"),
    [
        ({"activations": ("silu", None, "silu")}, {}, "other activation"),
        ({"activations": ("silu", "silu", None)}, {}, "other activation"),
        ({"eps": (1e-6, 1e-5)}, {}, "different eps"),
        ({"extra": returns(0)}, {}, "q (", ),
        ({"convolve": other_convolution(bias=lambda a: None)}, {}, "different biases"),
        (
            {"convolve": other_convolution(state_indices=lambda a: a["state_indices"].flip(0))},
            {},
            "other state_indices",
        ),
        ({"convolve": other_convolution(cu=lambda a: a["cu"] * 1)}, {}, "other cu_seqlens"),
        ({"convolve": one_state}, {}, "have one state"),
        ({}, {"weight": [torch.randn(n, w) for n, w in zip(WIDTHS, (W, 2, W), strict=True)]},
         "different taps"),
        ({}, {"state": [torch.randn(SLOTS, rows, n) for n, rows in zip(WIDTHS, (2, 3, 2),
                                                                      strict=True)]},
         "differ in slots"),
    ],
    ids=["activation", "activation-v", "eps", "q-used", "bias", "state_indices", "offsets",
         "one-state", "taps", "rows"],
)  # fmt: skip
def test_it_stays_where_the_guard_says_so(
    base: type, attributes: dict[str, Any], changed: dict[str, Any], reason: str
) -> None:
    found = compiled(variant(base, **{"layout": "SD", **attributes}), **changed)
    name = "kda_decode" if base is Step else "separate_convs"
    assert name not in found.fired
    assert [rewrite for rewrite, why in found.refused if reason in why] == [name]
    conv = "short_conv_update" if base is Step else "short_conv"
    assert found.operators[:3] == [conv] * 3


def test_the_convolved_v_may_have_other_uses() -> None:
    """A result of the one convolution, but inside the one step."""
    assert compiled(variant(extra=returns(2))).fired == ["separate_convs"]
    found = compiled(variant(Step, extra=returns(2)))
    assert found.operators[:3] == ["short_conv_update"] * 3
    assert "is also used by" in found.refused[0][1]


@pytest.mark.parametrize(
    ("convolve", "reason"),
    [(without_state, "are different operators"), (in_fp32, "convolve other tokens")],
)
def test_other_convolutions_stay(convolve: Any, reason: str) -> None:
    found = compiled(variant(convolve=convolve, layout="SD"))
    assert found.operators.count("short_conv") == 3
    assert reason in found.refused[0][1]


def test_more_keys_than_queries_stay() -> None:
    """Fewer heads of q, repeated for the recurrence."""

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *weights: Tensor) -> Any:
        q, k, v = (
            kda_ops.short_conv(x, w).unflatten(-1, (-1, K))
            for x, w in zip((q, k, v), weights, strict=True)
        )
        q = kda_ops.l2norm(q).repeat_interleave(2, dim=2)
        return kda_ops.chunk_kda(q, kda_ops.l2norm(k), v, g, beta)[0]

    widths = (H * K, 2 * H * K, 2 * H * K)
    heads = [torch.randn(1, T, n) for n in widths]
    gates = -torch.rand(1, T, 2 * H, K), torch.rand(1, T, 2 * H)
    found = rewritten(function, *heads, *gates, *(torch.randn(n, W) for n in widths))
    assert found.operators == ["short_conv", "l2norm"] * 2 + ["short_conv", "chunk_kda"]
    assert found.refused == [
        ("repeated_heads", "k is not repeated"),
        ("separate_convs", "q and k have different numbers of channels"),
    ]


def test_values_made_of_queries_stay() -> None:
    """The one convolution would come before its own input."""

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *weights: Tensor) -> Any:
        q, k = (
            kda_ops.l2norm(kda_ops.short_conv(x, w).unflatten(-1, (-1, K)))
            for x, w in zip((q, k), weights[:2], strict=True)
        )
        v = kda_ops.short_conv(v + q.mean(), weights[2]).unflatten(-1, (-1, V))
        return kda_ops.chunk_kda(q, k, v, g, beta)[0]

    widths = (H * K, H * K, HV * V)
    heads = [torch.randn(1, T, n) for n in widths]
    gates = -torch.rand(1, T, HV, K), torch.rand(1, T, HV)
    found = rewritten(function, *heads, *gates, *(torch.randn(n, W) for n in widths))
    assert "short_conv_qkv" not in found.operators
    assert "an input depends on l2norm" in found.refused[0][1]


@pytest.mark.parametrize("of", ["k", "v"])
def test_convolutions_of_a_norm_stay(of: str) -> None:
    """With one head, nothing is between the norm and the next convolution."""

    def function(x: Tensor, weight: Tensor, g: Tensor, beta: Tensor) -> Any:
        parts = dict(zip("qkv", zip(x.split(K, -1), weight.split(K), strict=True), strict=True))
        q = kda_ops.l2norm(kda_ops.short_conv(*parts["q"]))
        parts[of] = q, parts[of][1]
        k = kda_ops.l2norm(kda_ops.short_conv(*parts["k"]))
        q, k, v = (y[None, :, None] for y in (q, k, kda_ops.short_conv(*parts["v"])))
        return kda_ops.chunk_kda(q, k, v, g, beta)[0]

    gates = -torch.rand(1, T, 1, K), torch.rand(1, T, 1)
    found = rewritten(function, torch.randn(T, 3 * K), torch.randn(3 * K, W), *gates)
    assert found.operators.count("short_conv") == 3
    assert "an input depends on l2norm" in found.refused[0][1]


def test_without_norms_it_stays() -> None:
    found = compiled(variant(normalize=lambda self, x, eps: x, layout="SD"))
    assert found.operators == ["short_conv"] * 3 + ["chunk_kda"]
    assert "does not go into l2norm alone" in found.refused[0][1]


def test_two_convolutions_stay() -> None:
    class Shared(Prefill):
        def recur(self, q: Tensor, k: Tensor, v: Tensor, a: dict[str, Any]) -> Tensor:
            return super().recur(q, q, v, a)

    assert "short_conv_qkv" not in compiled(Shared()).operators


def test_a_state_changed_in_between_is_what_the_kernel_reads() -> None:
    """In a prefill the order of the writes is kept, whether or not the rewrite fires."""
    for part in (0, 1):
        compiled(variant(convolve=scaled_state(Prefill, part), layout="SD"))


def test_a_step_stays_if_a_state_is_changed_in_between() -> None:
    found = compiled(variant(Step, convolve=scaled_state(Step, 0)))
    assert found.operators[:3] == ["short_conv_update"] * 3
    assert "uses the convolution state before the recurrence" in found.refused[0][1]
