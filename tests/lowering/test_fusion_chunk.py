"""When the chunked recurrence absorbs raw gate and beta, and when not; gates in plain PyTorch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kda_ops
from kda_ops._numerics import RCP_LN2
from kda_ops.varlen import prepare_chunk_indices
from tests.support.fake_cuda import cuda_code, summary
from tests.support.rewritten import Rewritten, rewritten

H, HV, K, V, T, SLOTS = 1, 2, 16, 16, 70, 4


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype != torch.float64 else x


def sigmoid(beta: Tensor) -> Tensor:
    return torch.sigmoid(wide(beta))


def cumulative(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
    return kda_ops.gate_cumsum(x, A_log, bias, cu_seqlens=cu, chunk_indices=chunk_indices)


def model(
    gate: Callable[..., Tensor] = cumulative,
    beta_of: Callable[[Tensor], Tensor] = sigmoid,
    *,
    paged: bool = True,
    normalized: bool = True,
    varlen: bool = True,
    tables: bool = True,
    extra: Callable[..., Any] = lambda G, beta, q: None,
) -> Callable[..., Any]:
    """The recurrence over whole sequences as a model author writes it."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        beta: Tensor,
        A_log: Tensor,
        bias: Tensor,
        state: Tensor,
        state_indices: Tensor,
        cu: Tensor,
        chunk_indices: Tensor,
    ) -> Any:
        if not varlen:
            cu = chunk_indices = None
        if not tables:
            chunk_indices = None
        if normalized:
            q, k = kda_ops.l2norm(q), kda_ops.l2norm(k)
        G, step = gate(x, A_log, bias, cu, chunk_indices), beta_of(beta)
        pages = {"state": state, "state_indices": state_indices} if paged else {}
        o, _ = kda_ops.chunk_kda(
            q, k, v, G, step, cu_seqlens=cu, chunk_indices=chunk_indices, **pages
        )
        return o, extra(G, step, q)

    return call


def compiled(function: Callable[..., Any], dynamic: bool = False) -> Rewritten:
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16}
    cu = torch.tensor([0, 66, 70], dtype=torch.int32)
    inputs = (
        F.normalize(torch.randn(1, T, H, K), dim=-1).bfloat16(),
        F.normalize(torch.randn(1, T, H, K), dim=-1).bfloat16(),
        torch.randn(1, T, HV, V, **bf16),
        torch.randn(1, T, HV, K, **bf16),
        torch.randn(1, T, HV, **bf16),
        torch.randn(HV),
        torch.randn(HV * K),
        torch.randn(SLOTS, HV, V, K),
        torch.tensor([3, 1]),
        cu,
        prepare_chunk_indices(cu, T),
    )
    axes = dict.fromkeys(range(5), 1) if dynamic else False
    return rewritten(function, *inputs, dynamic=axes, written=(7,))


def in_two(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
    g = kda_ops.gate(x, A_log, bias)
    return kda_ops.chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu, chunk_indices=chunk_indices)


def scaled_later(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor
) -> Tensor:
    g = kda_ops.gate(x, A_log, bias, lower_bound=-5.0)
    return kda_ops.chunk_cumsum(g, cu_seqlens=cu, chunk_indices=chunk_indices) * RCP_LN2


def plain(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The cumulative gate of a formula of `z` and the rate `exp(A_log) [HV, 1]`."""

    def gate(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
        z = wide(x) + bias.view(HV, K)
        g = formula(z, A_log)
        return kda_ops.chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu, chunk_indices=chunk_indices)

    return gate


def softplus(z: Tensor, A_log: Tensor) -> Tensor:
    return -A_log.exp().unsqueeze(-1) * F.softplus(z)


def spelled_out(z: Tensor, A_log: Tensor) -> Tensor:
    grown = torch.where(z > 20, z, torch.log(1 + torch.exp(z)))
    return -(torch.exp(A_log).view(HV, 1) * grown)


def bounded(z: Tensor, A_log: Tensor) -> Tensor:
    return -5.0 * torch.sigmoid(A_log.exp()[:, None] * z)


def negative_rate(z: Tensor, A_log: Tensor) -> Tensor:
    """As `A = -exp(A_log)` in the layers of state-space models."""
    return (-torch.exp(A_log))[:, None] * torch.log1p(torch.exp(z))


def log_sigmoid(z: Tensor, A_log: Tensor) -> Tensor:
    return A_log.exp().view(1, 1, -1, 1) * F.logsigmoid(-z)


def with_beta(z: Tensor, A_log: Tensor) -> Tensor:
    """A softplus with a parameter, which is 1."""
    grown = torch.where(z * 1.0 > 20, z, (1 / 1.0) * torch.log(1 + torch.exp(z * 1.0)))
    return -A_log.exp()[:, None] * grown


def quotient(z: Tensor, A_log: Tensor) -> Tensor:
    return -5.0 * (1 / (1 + torch.exp(-(A_log.exp()[:, None] * z))))


def of_its_own_chunks(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Any, chunk_indices: Any
) -> Tensor:
    """Each operator makes its own table of the same chunks."""
    return kda_ops.gate_cumsum(x, A_log, bias, cu_seqlens=cu)


def logarithm_of_two(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor
) -> Tensor:
    g = kda_ops.gate(x, A_log, bias)
    return kda_ops.chunk_cumsum(g, cu_seqlens=cu, chunk_indices=chunk_indices) / math.log(2)


def of_tokens(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
    """A gate of `[T, HV, K]`, as a server's layer has it."""
    g = kda_ops.gate(x[0], A_log, bias)[None]
    return kda_ops.chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu, chunk_indices=chunk_indices)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        model(),
        model(of_tokens),
        model(beta_of=lambda beta: 2 * sigmoid(beta), paged=False),
        model(in_two, normalized=False),
        model(scaled_later),
        model(plain(softplus)),
        model(plain(spelled_out)),
        model(plain(bounded)),
    ],
    ids=[
        "pages",
        "tokens",
        "doubled",
        "in-two",
        "scaled-later",
        "softplus",
        "where-log",
        "bounded",
    ],
)
def test_it_is_one_operator(function: Callable[..., Any], dynamic: bool) -> None:
    found = compiled(function, dynamic)
    assert found.refused == []
    assert [name for name in found.operators if name != "l2norm"] == ["chunk_kda_gated"]
    assert found.copies == 0


@pytest.mark.parametrize(
    "function",
    [
        *(model(plain(f)) for f in (negative_rate, log_sigmoid, with_beta, quotient)),
        model(of_its_own_chunks, tables=False),
        model(logarithm_of_two),
        model(beta_of=lambda beta: 1 / (1 + torch.exp(-wide(beta)))),
    ],
    ids=["negative", "log-sigmoid", "beta-1", "quotient", "own-chunks", "ln-2", "beta-quotient"],
)
def test_other_spellings_are_one_operator(function: Callable[..., Any]) -> None:
    found = compiled(function)
    assert found.refused == []
    assert found.operators == ["l2norm", "l2norm", "chunk_kda_gated"]


def test_a_per_token_gate_is_not_in_memory_either() -> None:
    def function(*args: Tensor) -> Tensor:
        q, k, v, x, beta, A_log = args
        g = kda_ops.gate(x, A_log)[None]
        G = kda_ops.chunk_cumsum(g, scale=RCP_LN2)
        return kda_ops.chunk_kda(q, k, v, G, torch.sigmoid(beta.float()))[0]

    heads = [torch.randn(1, T, HV, 64, dtype=torch.bfloat16) for _ in range(4)]
    q, k = (F.normalize(y.float(), dim=-1).bfloat16() for y in heads[:2])
    inputs = q, k, heads[2], heads[3][0], torch.randn(1, T, HV), torch.randn(HV)
    _, (source,) = cuda_code(function, *inputs)
    assert summary(source).launches == ["chunk_gated_prepare_kernel", "chunk_scan_kernel"]


def in_nats(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
    g = kda_ops.gate(x, A_log, bias)
    return kda_ops.chunk_cumsum(g, cu_seqlens=cu, chunk_indices=chunk_indices)


def other_chunks(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor
) -> Tensor:
    """A gate that restarts within a chunk makes the state grow; a weak one stays finite."""
    return kda_ops.gate_cumsum(x, A_log - 4, bias, chunk_size=32, cu_seqlens=cu)


def other_chunks_alone(x: Tensor, A_log: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return kda_ops.gate_cumsum(x, A_log - 4, bias, chunk_size=32)


def one_head(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
    """One rate for all heads."""
    g = kda_ops.gate(x.flatten(2)[:, :, None], A_log[:1], bias).view(x.shape)
    return kda_ops.chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu, chunk_indices=chunk_indices)


def one_head_cumulative(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor
) -> Tensor:
    x4 = x.flatten(2)[:, :, None]
    G = kda_ops.gate_cumsum(x4, A_log[:1], bias, cu_seqlens=cu, chunk_indices=chunk_indices)
    return G.view(x.shape)


def other_lengths(
    x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor
) -> Tensor:
    return kda_ops.gate_cumsum(x, A_log, bias)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (model(in_nats), "not 1 / ln 2"),
        (model(other_chunks), "has other chunk_indices"),
        (model(other_chunks_alone, varlen=False, paged=False), "is 32, not 64"),
        (model(one_head), "has other heads"),
        (model(one_head_cumulative), "in another shape"),
        (model(other_lengths), "has other c"),
        (model(beta_of=lambda beta: 3 * sigmoid(beta)), "beta is not"),
        (model(beta_of=lambda beta: sigmoid(beta).bfloat16()), "beta is not"),
        (model(extra=lambda G, beta, q: G), "is returned"),
        (model(extra=lambda G, beta, q: G * 2), "is also used by"),
        (model(extra=lambda G, beta, q: beta), "is returned"),
    ],
    ids=[
        "nats",
        "chunk_indices",
        "chunk-size",
        "heads",
        "cumulative-heads",
        "lengths",
        "factor",
        "dtype",
        "G-returned",
        "G-used",
        "beta",
    ],
)
def test_it_stays_where_the_guard_says_so(function: Callable[..., Any], reason: str) -> None:
    found = compiled(function)
    assert "chunk_kda" in found.operators
    assert [name for name, why in found.refused if reason in why] == ["chunk_kda_gated"]


def test_norms_stay_in_front_of_the_general_kernel() -> None:
    found = compiled(model())
    assert found.operators == ["l2norm", "l2norm", "chunk_kda_gated"]
    assert found.refused == []


def normed(
    paged: bool = False,
    q_norm: Callable[[Tensor], Tensor] = kda_ops.l2norm,
    k_norm: Callable[[Tensor], Tensor] = kda_ops.l2norm,
    extra: Callable[[Tensor], Any] = lambda q: None,
) -> Callable[..., Any]:
    """A recurrence with head size 64, preceded by the norms."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor, *pages: Tensor
    ) -> Any:
        G, step = kda_ops.gate_cumsum(x, A_log), sigmoid(beta)
        q, k = q_norm(q), k_norm(k)
        where = {"state": pages[0], "state_indices": pages[1]} if paged else {}
        return kda_ops.chunk_kda(q, k, v, G, step, **where)[0], extra(q)

    return call


def compiled_heads_of_64(function: Callable[..., Any], dynamic: bool = False) -> Rewritten:
    torch.manual_seed(0)
    heads = [torch.randn(1, T, HV, 64).bfloat16() for _ in range(4)]
    beta, A_log = torch.randn(1, T, HV).bfloat16(), torch.randn(HV)
    pages = torch.randn(SLOTS, HV, 64, 64), torch.tensor([2])
    axes = dict.fromkeys(range(5), 1) if dynamic else False
    return rewritten(function, *heads, beta, A_log, *pages, dynamic=axes, written=(6,))


def in_flat_rows(q: Tensor) -> Tensor:
    """Reshaped before the norm, and back."""
    return kda_ops.l2norm(q.flatten(0, 2)).view(q.shape)


def in_plain_torch(q: Tensor) -> Tensor:
    wide_q = wide(q)
    return (wide_q * torch.rsqrt((wide_q * wide_q).sum(-1, keepdim=True) + 1e-6)).to(q.dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "function",
    [
        normed(),
        normed(paged=True),
        normed(q_norm=in_flat_rows),
        normed(q_norm=in_plain_torch, k_norm=in_plain_torch),
    ],
    ids=["tokens", "pages", "flat-rows", "plain"],
)
def test_it_absorbs_the_norms(function: Callable[..., Any], dynamic: bool) -> None:
    found = compiled_heads_of_64(function, dynamic)
    assert found.refused == []
    assert found.operators == ["chunk_kda_gated"]
    assert found.copies == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (normed(k_norm=lambda k: kda_ops.l2norm(k, eps=1e-5)), "different eps"),
        (normed(k_norm=lambda k: kda_ops.l2norm(k.flatten(2)).view(k.shape)), "not over heads"),
        (normed(extra=lambda q: q), "is returned"),
        (normed(extra=lambda q: q * 2), "is also used by"),
    ],
    ids=["eps", "all-heads", "returned", "used"],
)
def test_norms_stay_where_the_guard_says_so(function: Callable[..., Any], reason: str) -> None:
    found = compiled_heads_of_64(function)
    assert found.operators == ["l2norm", "l2norm", "chunk_kda_gated"]
    assert [name for name, why in found.refused if reason in why] == ["chunk_norms"]


def test_one_norm_of_two_stays() -> None:
    found = compiled_heads_of_64(normed(k_norm=lambda k: F.normalize(k, p=1.0, dim=-1)))
    assert found.operators == ["l2norm", "chunk_kda_gated"]


def faster(z: Tensor, A_log: Tensor) -> Tensor:
    return -2 * A_log.exp().unsqueeze(-1) * F.softplus(z)


def deeper(z: Tensor, A_log: Tensor) -> Tensor:
    return -8.0 * torch.sigmoid(A_log.exp()[:, None] * z)


def rounded(z: Tensor, A_log: Tensor) -> Tensor:
    narrow = z.dtype if z.dtype == torch.float64 else torch.bfloat16
    return spelled_out(z.to(narrow), A_log.to(narrow))


def one_rate(z: Tensor, A_log: Tensor) -> Tensor:
    return -A_log[:1].exp().unsqueeze(-1) * F.softplus(z)


def shared(z: Tensor, A_log: Tensor) -> Tensor:
    """The heads differ only in their rates."""
    return -A_log.exp().unsqueeze(-1) * F.softplus(z[:, :, :1])


def shared_bounded(z: Tensor, A_log: Tensor) -> Tensor:
    return -5.0 * torch.sigmoid(A_log.exp()[:, None] * z[:, :, :1])


def earlier(z: Tensor, A_log: Tensor) -> Tensor:
    return -A_log.exp().unsqueeze(-1) * F.softplus(z, threshold=10)


def twice_one(z: Tensor, A_log: Tensor) -> Tensor:
    grown = torch.log(torch.add(torch.exp(z), 1, alpha=2))
    return -A_log.exp().unsqueeze(-1) * torch.where(z > 20, z, grown)


def sharper(z: Tensor, A_log: Tensor) -> Tensor:
    return -A_log.exp().unsqueeze(-1) * F.softplus(z, beta=2)


def of_others(z: Tensor, A_log: Tensor) -> Tensor:
    """The threshold has another user."""
    grown = torch.where(z.flip(1) > 20, z, torch.log(1 + torch.exp(z)))
    return -A_log.exp().unsqueeze(-1) * grown


def log_sigmoid_of_others(z: Tensor, A_log: Tensor) -> Tensor:
    less = torch.minimum(z.new_zeros(()), -z)
    return A_log.exp().unsqueeze(-1) * (less - torch.log1p(torch.exp(-z.flip(1).abs())))


def difference(z: Tensor, A_log: Tensor) -> Tensor:
    return -A_log.exp().unsqueeze(-1) * (z - 1.0).abs()


def rates_alone(z: Tensor, A_log: Tensor) -> Tensor:
    """A gate without an input."""
    return z * 0 - 5.0 * torch.sigmoid(A_log.exp().unsqueeze(-1) * 2.0)


def regrouped(gate: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The rates are those of pairs of tokens, with as many heads of twice the width."""

    def formula(z: Tensor, A_log: Tensor) -> Tensor:
        return gate(z.reshape(1, T // 2, HV, 2 * K), A_log).view(z.shape)

    return formula


@pytest.mark.parametrize(
    ("formula", "reasons"),
    [
        (faster, ["the rate has a factor 2"]),
        (deeper, ["the bound is -8.0"]),
        (rounded, ["is in torch.bfloat16"]),
        (one_rate, ["not one rate per head"]),
        (shared, ["has not an element for each of the gate"]),
        (shared_bounded, ["has not an element for each of the gate"]),
        (earlier, []),
        (twice_one, []),
        (sharper, []),
        (of_others, []),
        (log_sigmoid_of_others, []),
        (difference, []),
        (rates_alone, []),
        (regrouped(softplus), ["has other heads"]),
        (regrouped(bounded), ["has other heads"]),
    ],
    ids=lambda x: getattr(x, "__qualname__", None),
)
def test_another_formula_stays(formula: Callable[..., Tensor], reasons: list[str]) -> None:
    found = compiled(model(plain(formula)))
    assert "chunk_kda_gated" not in found.operators
    assert "gate" not in found.operators
    for reason in reasons:
        assert any(name == "plain_gate" and reason in why for name, why in found.refused)


@pytest.mark.parametrize("place", [0, 2])
def test_a_gate_that_is_also_a_query_or_value_stays(place: int) -> None:
    def function(x: Tensor, beta: Tensor, A_log: Tensor, *heads: Tensor) -> Tensor:
        G = kda_ops.gate_cumsum(x, A_log)
        return kda_ops.chunk_kda(*heads[:place], G, *heads[place:], G, torch.sigmoid(beta))[0]

    heads = [F.normalize(torch.randn(1, 9, HV, K), dim=-1) for _ in range(2)]
    given = torch.randn(1, 9, HV, K) - 9, torch.randn(1, 9, HV), torch.zeros(HV)
    found = rewritten(function, *given, *heads)
    assert found.refused == [("chunk_kda_gated", "an input depends on gate_cumsum")]


def test_a_plain_gate_with_another_user_stays() -> None:
    def gate(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, chunk_indices: Tensor) -> Tensor:
        z = wide(x) + bias.view(HV, K)
        G = kda_ops.chunk_cumsum(
            softplus(z, A_log), scale=RCP_LN2, cu_seqlens=cu, chunk_indices=chunk_indices
        )
        return G + 0 * z

    assert "gate" not in compiled(model(gate)).operators


def test_a_number_per_token_is_not_a_bias() -> None:
    """Though there are as many of them."""
    rows = HV * K

    def function(x: Tensor, A_log: Tensor, added: Tensor) -> Tensor:
        g = -A_log.exp().unsqueeze(-1) * F.softplus(wide(x) + added[:, None, None])
        return kda_ops.chunk_cumsum(g)

    x = torch.randn(1, rows, HV, K, dtype=torch.bfloat16)
    found = rewritten(function, x, torch.randn(HV), torch.randn(rows))
    assert found.operators == ["gate", "chunk_cumsum"]
