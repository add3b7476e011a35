"""When a decode step of small operators becomes one kernel, and when not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.rewritten import Rewritten, rewritten

H, HV, K, V, W, T, SLOTS = 2, 4, 8, 16, 3, 3, 5
KEY, VALUE = H * K, HV * V
D = 2 * KEY + VALUE
SMALL = ["short_conv_update", "l2norm", "l2norm", "gate", "recurrent_kda", "rms_norm_gated"]


class Step:
    """A decode step as a model author writes it; what a test changes is an attribute."""

    layout = "SD"
    lower_bound: float | None = None
    norm_eps = (1e-6, 1e-6)
    cleared = True
    varlen = True
    paged = True
    state_layout = "VK"
    accepted: tuple[Tensor | None, Tensor | None] = (None, None)  # of convolution and recurrence

    def __call__(
        self, x, f, beta, z, conv, state, state_indices, cu, weight, A_log, bias, o_weight
    ):
        if not self.varlen:
            cu = None
        if not self.paged:
            state_indices = None
        y = self.convolve(x, conv, weight, state_indices, cu)[None]
        q, k, v = y.split([KEY, KEY, VALUE], dim=-1)
        q = self.normalize(q.unflatten(-1, (H, K)), self.norm_eps[0])
        k = self.normalize(k.unflatten(-1, (H, K)), self.norm_eps[1])
        v = v.unflatten(-1, (HV, V))
        g = self.decay(f, A_log, bias)
        step = torch.sigmoid(beta.float() if beta.dtype != torch.float64 else beta)
        heads = (q, k, v, g, self.scaled(step))
        if cu is None:
            heads = tuple(y.transpose(0, 1) for y in heads)
        state = self.between(state, conv)
        how = {"cu_seqlens": cu, "num_accepted": self.accepted[1]}
        how["state_layout"] = self.state_layout
        o = kda_ops.recurrent_kda(*heads, state, state_indices, **how)
        o = o.view(1, T, HV, V) if cu is None else o
        return self.finish(o, z, o_weight, cu)

    def convolve(self, x, conv, weight, state_indices, cu):
        how = {"cu_seqlens": cu, "num_accepted": self.accepted[0], "layout": self.layout}
        return kda_ops.short_conv_update(x, conv, weight, state_indices=state_indices, **how)

    def normalize(self, x, eps):
        return kda_ops.l2norm(x, eps=eps)

    def decay(self, f, A_log, bias):
        return kda_ops.gate(f, A_log, bias, lower_bound=self.lower_bound)

    def scaled(self, step):
        return step

    def between(self, state, conv):
        return state

    def finish(self, o, z, o_weight, cu):
        y = kda_ops.rms_norm_gated(o, z, o_weight)
        if cu is None or not self.cleared:
            return y
        real = torch.arange(y.shape[1], device=y.device) < cu[-1]
        return torch.where(real[:, None, None], y, 0)


def doubled(self, step):
    return 2 * step


def inputs(layout: str = "SD") -> dict[str, Tensor]:
    """The arguments of a step."""
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16}
    return {
        "x": torch.randn(T, D, **bf16),
        "f": torch.randn(1, T, HV, K, **bf16),
        "beta": torch.randn(1, T, HV, **bf16),
        "z": torch.randn(1, T, HV, V, **bf16),
        "conv": torch.randn(SLOTS, *((W - 1, D) if layout == "SD" else (D, W - 1)), **bf16),
        "state": torch.randn(SLOTS, HV, V, K),
        "state_indices": torch.tensor([2, 0, 4]),
        "cu": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        "weight": torch.randn(D, W, **bf16),
        "A_log": torch.randn(HV),
        "bias": torch.randn(HV * K),
        "o_weight": torch.randn(V),
    }


def compiled(step: Callable[..., Tensor], dynamic: bool = False, **changed: Tensor) -> Rewritten:
    given = inputs(getattr(step, "layout", "SD")) | changed
    return rewritten(step, *given.values(), dynamic=dynamic, written=(4, 5))


def variant(**attributes: object) -> Step:
    """A step with other attributes or methods."""
    return type("Variant", (Step,), attributes)()


def in_plain_pytorch(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (o_weight * x.to(o.dtype) * torch.sigmoid(wide(z))).to(o.dtype)


def l2norm_in_plain_pytorch(self, x, eps):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gate_in_plain_pytorch(self, f, A_log, bias):
    z = wide(f) + bias.view(HV, K)
    return -A_log.exp()[:, None] * torch.nn.functional.softplus(z)


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


PLAIN = {
    "finish": in_plain_pytorch,
    "normalize": l2norm_in_plain_pytorch,
    "decay": gate_in_plain_pytorch,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"layout": "DS", "lower_bound": -5.0, "scaled": doubled},
        {"varlen": False},
        {"cleared": False},
        PLAIN,
    ],
    ids=["SD", "DS-bounded-negative", "one-each", "padding-kept", "plain-pytorch"],
)
def test_a_step_is_one_operator(attributes: dict[str, object], dynamic: bool) -> None:
    found = compiled(variant(**attributes), dynamic=dynamic)
    assert found.refused == []
    assert found.fired[-1] == "kda_decode"
    assert found.operators == ["kda_decode"]
    assert found.copies == 0


ACCEPTED = torch.tensor([2, 1])


def speculative(rows: int = W, layout: str = "SD") -> dict[str, Tensor]:
    """Two sequences of two tokens and of one, each with a slot for either."""
    conv = torch.randn(SLOTS, *((rows, D) if layout == "SD" else (D, rows)), dtype=torch.bfloat16)
    state_indices, cu = torch.tensor([[2, 1], [4, 3]]), torch.tensor([0, 2, 3], dtype=torch.int32)
    return {"conv": conv, "state_indices": state_indices, "cu": cu}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {"accepted": (ACCEPTED, ACCEPTED)},
        {"accepted": (ACCEPTED, ACCEPTED), "layout": "DS", "lower_bound": -5.0, "scaled": doubled},
        {"accepted": (ACCEPTED, ACCEPTED), **PLAIN},
        {},
    ],
    ids=["SD", "DS-bounded-negative", "plain-pytorch", "first-step"],
)
def test_a_speculative_step_is_one_operator(attributes: dict[str, object], dynamic: bool) -> None:
    """A state after every token, from which the next step continues: all are compared."""
    step = variant(**attributes)
    found = compiled(step, dynamic=dynamic, **speculative(layout=step.layout))
    assert found.refused == []
    assert found.operators == ["kda_decode"]
    assert found.copies == 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("varlen", [False, True], ids=["one-each", "ragged"])
def test_a_step_of_a_dense_cache_is_one_operator(varlen: bool, dynamic: bool) -> None:
    """A page for each sequence, with K first."""
    step = variant(paged=False, varlen=varlen, state_layout="KV", layout="DS")
    found = compiled(step, dynamic=dynamic, state=torch.randn(T, HV, K, V))
    assert found.refused == []
    assert found.operators == ["kda_decode"]
    assert found.copies == 0


def test_one_state_by_slots_and_one_without_stay() -> None:
    def convolve(self, x, conv, weight, state_indices, cu):
        return kda_ops.short_conv_update(x, conv, weight, cu_seqlens=cu, layout=self.layout)

    found = compiled(variant(convolve=convolve))
    assert found.operators == SMALL
    assert "other state_indices" in found.refused[0][1]


def test_other_accepted_tokens_stay() -> None:
    found = compiled(variant(accepted=(ACCEPTED, ACCEPTED.flip(0))), **speculative())
    assert found.operators == SMALL
    assert "other num_accepted" in found.refused[0][1]


def test_more_tokens_than_the_kernel_unrolls_stay() -> None:
    """The rows of the convolution state limit the tokens of a sequence."""
    step = variant(accepted=(ACCEPTED, ACCEPTED))
    assert compiled(step, **speculative(rows=W + 6)).operators == ["kda_decode"]
    found = compiled(step, **speculative(rows=W + 7))
    assert found.operators == SMALL
    assert found.refused == [("kda_decode", "a sequence may have 9 tokens, more than 8")]


def test_several_tokens_each_without_offsets_stay() -> None:
    def step(x, f, beta, z, conv, state, state_indices, cu, weight, A_log, bias, o_weight):
        y = kda_ops.short_conv_update(x[None], conv, weight, state_indices=state_indices)
        q, k, v = y.split([KEY, KEY, VALUE], dim=-1)
        q, k = (kda_ops.l2norm(part.unflatten(-1, (H, K))) for part in (q, k))
        g, step = kda_ops.gate(f, A_log, bias), torch.sigmoid(wide(beta))
        heads = (q, k, v.unflatten(-1, (HV, V)), g, step)
        return kda_ops.rms_norm_gated(
            kda_ops.recurrent_kda(*heads, state, state_indices), z, o_weight
        )

    conv = torch.randn(SLOTS, W - 2 + T, D, dtype=torch.bfloat16)
    found = compiled(step, conv=conv, state_indices=torch.tensor([2]))
    assert found.operators == SMALL
    assert found.refused == [("kda_decode", "several tokens per sequence without cu_seqlens")]


def test_a_gate_of_other_heads_stays() -> None:
    """One rate for all: `A_log` does not have an element per value head."""

    def decay(self, f, A_log, bias):
        return kda_ops.gate(f.flatten(-2)[..., None, :], A_log[:1], bias).view(f.shape)

    found = compiled(variant(decay=decay))
    assert found.operators == SMALL
    assert "has other heads" in found.refused[0][1]


def test_padding_rows_stay_zero_whatever_their_gate() -> None:
    z = torch.full((1, T, HV, V), torch.nan, dtype=torch.bfloat16)
    z[:, :1] = 1
    cu = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    assert compiled(Step(), z=z, cu=cu).operators == ["kda_decode"]


def unnormalized(self, x, eps):
    return x


def nats(self, f, A_log, bias):
    return -torch.exp(f.float() if f.dtype != torch.float64 else f)


def both(self, o, z, o_weight, cu):
    return kda_ops.rms_norm_gated(o, z, o_weight), o


def unfinished(self, o, z, o_weight, cu):
    return o * 2


def erased(self, state, conv):
    state.mul_(0.5)
    return state


def conv_erased(self, state, conv):
    conv.mul_(0.5)
    return state


def tripled(self, x, eps):
    return kda_ops.l2norm(x, eps=eps) * 3


def another_mean(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5)
    return (o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


def unrounded(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return o_weight * x * torch.sigmoid(wide(z))


def per_head(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (o_weight[:HV, None] * o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


def one_gate(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (o_weight * x * torch.sigmoid(wide(z)[..., :1].contiguous())).to(o.dtype)


def twice_eps(self, o, z, o_weight, cu):
    x = wide(o)
    mean, eps = x.pow(2).mean(-1, keepdim=True), x.new_full((), 0.5)
    x = x * torch.rsqrt(torch.add(mean, eps, alpha=2))
    return (o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


def scaled(o, weight, z, between=lambda y: y):
    """The norm with something done to it before the gate."""
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (between(weight * x) * torch.sigmoid(wide(z))).to(o.dtype)


def of_integers(self, o, z, o_weight, cu):
    return scaled(o, o_weight, z, lambda y: y.to(torch.int32))


def quantised(self, o, z, o_weight, cu):
    return scaled(o, o_weight, z, lambda y: y.to(torch.float8_e5m2).to(y.dtype))


def swish(self, o, z, o_weight, cu):
    return scaled(o, o_weight, z) * z


def over_all(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * torch.rsqrt(x.pow(2).mean(dim=None, keepdim=True) + 1e-5)
    return (o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


def cube_root(self, o, z, o_weight, cu):
    x = wide(o)
    x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** (-1 / 3)
    return (o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


def divided(self, o, z, o_weight, cu):
    """By the root of the mean, in the wrong direction."""
    x = wide(o)
    x = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) / x
    return (o_weight * x * torch.sigmoid(wide(z))).to(o.dtype)


@pytest.mark.parametrize(
    ("finish", "reasons"),
    [
        (of_integers, []),
        (quantised, []),
        (over_all, []),
        (cube_root, []),
        (divided, []),
        (unrounded, ["the norm of torch.bfloat16 is in torch.float32"]),
        (one_gate, ["the gate has another shape"]),
        (per_head, []),
        (twice_eps, []),
        (another_mean, []),
    ],
)
def test_another_norm_is_not_the_operator(
    finish: Callable[..., Tensor], reasons: list[str]
) -> None:
    found = compiled(variant(finish=finish))
    assert found.operators == SMALL[:-1]
    assert [why for name, why in found.refused if name == "plain_rms_norm_gated"] == reasons


def with_rms_norm(self, o, z, o_weight, cu):
    normed = torch.nn.functional.rms_norm(o, (V,), o_weight.to(o.dtype), 1e-5)
    return normed * torch.sigmoid(z)


def with_square_root(self, o, z, o_weight, cu):
    x = wide(o) / torch.sqrt(wide(o).square().mean(-1).unsqueeze(-1) + 1e-5)
    return (o_weight * x * (1 / (1 + torch.exp(-wide(z))))).to(o.dtype)


def gated_in_one_row(self, o, z, o_weight, cu):
    """The output of all heads in one row, and a gate that is rounded."""
    x = wide(o)
    x = x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    gate = torch.sigmoid(wide(z.flatten(-2))).to(z.dtype)
    return (o_weight * x).to(o.dtype).flatten(-2) * gate


@pytest.mark.parametrize("finish", [with_rms_norm, with_square_root, gated_in_one_row])
def test_other_spellings_of_the_norm(finish: Callable[..., Tensor]) -> None:
    found = compiled(variant(finish=finish))
    assert found.operators == ["kda_decode"]
    assert found.refused == []


def test_a_swish_is_not_a_sigmoid() -> None:
    """The rest is multiplied afterwards; with the norm inside, the result differs."""
    assert compiled(variant(finish=swish)).operators == ["kda_decode"]

    def silu(self, o, z, o_weight, cu):
        x = wide(o)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (o_weight * x * torch.nn.functional.silu(wide(z))).to(o.dtype)

    assert compiled(variant(finish=silu)).operators == SMALL[:-1]


@pytest.mark.parametrize("part", ["f", "z"])
def test_a_gate_made_of_values_stays(part: str) -> None:
    """The step would depend on itself."""

    def step(x, f, beta, z, conv, state, state_indices, cu, weight, A_log, bias, o_weight):
        y = kda_ops.short_conv_update(x, conv, weight, state_indices=state_indices, cu_seqlens=cu)[
            None
        ]
        q, k, v = (y.unflatten(-1, (-1, K)) for y in y.split(KEY, dim=-1))
        given = {"f": f, "z": f, part: v}
        g, step = kda_ops.gate(given["f"], None, lower_bound=-5.0), torch.sigmoid(wide(beta))
        q, k = kda_ops.l2norm(q), kda_ops.l2norm(k)
        o = kda_ops.recurrent_kda(q, k, v, g, step, state, state_indices, cu_seqlens=cu)
        return kda_ops.rms_norm_gated(o, given["z"], o_weight[:K])

    given = inputs()
    changed = {
        "x": given["x"][:, : 3 * KEY],
        "f": given["f"][:, :, :H],
        "beta": given["beta"][:, :, :H],
        "conv": given["conv"][:, :, : 3 * KEY].clone(),
        "state": torch.randn(SLOTS, H, K, K),
        "weight": given["weight"][: 3 * KEY],
    }
    found = compiled(step, **changed)
    assert found.operators == SMALL
    assert "an input depends on" in found.refused[0][1]


def test_a_weight_per_head_is_not_one_per_channel() -> None:
    """Where there are as many heads as channels."""

    def finish(o: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        x = wide(o)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (weight[:, None] * x * torch.sigmoid(wide(z))).to(o.dtype)

    def step(q, v, g, beta, state, state_indices, weight):
        return finish(kda_ops.recurrent_kda(q, q, v, g, beta, state, state_indices), v, weight)

    q, v = torch.randn(2, 1, 4, K), torch.randn(2, 1, 4, 4)
    g, beta, state_indices = -torch.rand(2, 1, 4, K), torch.rand(2, 1, 4), torch.tensor([2, 1])
    found = rewritten(
        step, q, v, g, beta, torch.randn(3, 4, 4, K), state_indices, torch.randn(4), written=(4,)
    )
    assert found.operators == ["recurrent_kda"]


def wider_heads(self, x, eps):
    return kda_ops.l2norm(x.flatten(-2).unflatten(-1, (1, H * K)), eps=eps).view(x.shape)


def narrower_heads(self, x, eps):
    return kda_ops.l2norm(x.unflatten(-1, (2, K // 2)), eps=eps).view(x.shape)


def gated_by_itself(self, o, z, o_weight, cu):
    return kda_ops.rms_norm_gated(o, o, o_weight)


def axis(self, o, z, o_weight, cu):
    y = kda_ops.rms_norm_gated(o.flatten(-2), z.flatten(-2), o_weight.repeat(HV))
    return y.unflatten(-1, (HV, V))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"norm_eps": (1e-6, 1e-5)}, "different eps"),
        ({"scaled": lambda self, step: 3 * step}, "beta is not"),
        ({"normalize": tripled}, "is not the q of"),
        ({"normalize": wider_heads}, "not of 1 x 16 as they are normalised"),
        ({"normalize": narrower_heads}, "not of 4 x 4 as they are normalised"),
        ({"finish": gated_by_itself}, "an input depends on"),
        ({"decay": nats}, "g is not a gate"),
        ({"finish": both}, "does not go into rms_norm_gated alone"),
        ({"finish": unfinished}, "does not go into rms_norm_gated alone"),
        ({"finish": axis}, "does not normalise the value heads"),
        ({"finish": another_mean}, "does not go into rms_norm_gated alone"),
        ({"finish": unrounded}, "does not go into rms_norm_gated alone"),
        ({"between": erased}, "is the recurrent state, written after"),
        ({"between": conv_erased}, "uses the convolution state before"),
    ],
)
def test_it_stays_where_the_guard_says_so(attributes: dict[str, object], reason: str) -> None:
    found = compiled(variant(**attributes))
    assert "kda_decode" not in found.operators
    assert [name for name, why in found.refused if reason in why] == ["kda_decode"]


def test_it_stays_without_norms() -> None:
    found = compiled(variant(normalize=unnormalized))
    assert "kda_decode" not in found.operators
    assert "short_conv_update" in found.operators


def test_other_slots_stay() -> None:
    def other(self, x, conv, weight, state_indices, cu):
        return kda_ops.short_conv_update(
            x, conv, weight, state_indices=state_indices.flip(0), cu_seqlens=cu
        )

    found = compiled(variant(convolve=other))
    assert "kda_decode" not in found.operators
    assert "other state_indices" in found.refused[0][1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_states_may_be_in_the_same_pages(dynamic: bool) -> None:
    """Each written view is one of the same base, and the second write follows the first."""
    conv_size = (W - 1) * D

    def step(x, f, beta, z, pages, _, state_indices, cu, *weights):
        conv = pages[:, :conv_size].unflatten(1, (W - 1, D))
        state = pages[:, conv_size : conv_size + HV * V * K].unflatten(1, (HV, V, K))
        return Step()(x, f, beta, z, conv, state, state_indices, cu, *weights)

    pages = torch.randn(SLOTS, conv_size + HV * V * K + 3)
    found = compiled(step, dynamic=dynamic, conv=pages)
    assert found.refused == []
    assert found.operators == ["kda_decode"]
    assert found.copies == 0


def test_all_layers_of_one_cache_fuse() -> None:
    """Slices of one tensor: the second layer's states are views of what the first has written."""

    def layers(x, f, beta, z, conv, state, *rest):
        first = Step()(x, f, beta, z, conv[:SLOTS], state[:SLOTS], *rest)
        z = z + first
        return Step()(x, f, beta, z, conv[SLOTS:], state[SLOTS:], *rest)

    conv = torch.randn(2 * SLOTS, W - 1, D, dtype=torch.bfloat16)
    found = compiled(layers, conv=conv, state=torch.randn(2 * SLOTS, HV, V, K))
    assert found.refused == []
    assert found.operators == ["kda_decode", "kda_decode"]
    assert found.copies == 0
