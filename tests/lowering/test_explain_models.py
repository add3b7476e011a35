"""`kda_ops.explain` of whole models: code around the layers, and code that cannot be generated."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

import kda_ops
from kda_ops.lowering.explain.unguarded import get, put, unguarded
from kda_ops.nn.layer import KimiDeltaAttention
from tests.lowering.test_explain import heads
from tests.lowering.test_launch_contract import PREFILL

HIDDEN, H, K, TOKENS, BF16 = 64, 2, 64, 24, torch.bfloat16
COMPLEX = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for")


class LatentAttention(nn.Module):
    """Keys and values from one latent, a rotary part for all heads, heads of V narrower than of QK,
    and a cache that is written in place.
    """

    NOPE, ROPE, V, RANK, LONGEST = 24, 8, 16, 32, 64
    cache: Tensor
    rotations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, H * (self.NOPE + self.ROPE), bias=False)
        self.kv_a = nn.Linear(HIDDEN, self.RANK + self.ROPE, bias=False)
        self.norm = nn.RMSNorm(self.RANK)
        self.kv_b = nn.Linear(self.RANK, H * (self.NOPE + self.V), bias=False)
        self.o_proj = nn.Linear(H * self.V, HIDDEN, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("cache", torch.zeros(2, self.LONGEST, self.RANK + self.ROPE))
        angles = torch.outer(torch.arange(self.LONGEST), 0.5 ** torch.arange(self.ROPE // 2))
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()], dim=-1))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        pairs, turns = x.float().unflatten(-1, (-1, 2)), self.rotations[positions].float()
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (H, -1)).transpose(1, 2).clone()
        q[..., self.NOPE :] = self.rotated(q[..., self.NOPE :], positions)
        latent, rope = self.kv_a(x).split([self.RANK, self.ROPE], dim=-1)
        rope = self.rotated(rope, positions)
        if not torch.is_grad_enabled():
            self.cache.index_copy_(1, positions, torch.cat([latent, rope], dim=-1))
            self.cache[:, -1] = 0
        k, v = self.kv_b(self.norm(latent)).unflatten(-1, (H, -1)).split([self.NOPE, self.V], -1)
        k = torch.cat([k, rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
        v = F.pad(v, (0, k.shape[-1] - self.V))
        mask = mask[:, None] & (positions[:, None] >= positions[None])
        o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.dropout(self.o_proj(o[..., : self.V].transpose(1, 2).flatten(2)))


class Experts(nn.Module):
    """Routed over groups with a bias that only selects, dispatched in sorted order."""

    EXPERTS, TOP = 4, 2
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, self.EXPERTS, bias=False)
        self.register_buffer("bias", torch.zeros(self.EXPERTS))
        self.up = nn.Parameter(torch.randn(self.EXPERTS, HIDDEN, 32) / 8)
        self.down = nn.Parameter(torch.randn(self.EXPERTS, 32, HIDDEN) / 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores = self.router(rows).float().sigmoid()
        groups = (scores + self.bias).unflatten(-1, (2, -1)).amax(-1).topk(1).indices
        allowed = torch.zeros_like(scores[:, :2]).scatter_(1, groups, 1.0).bool()
        biased = (scores + self.bias).masked_fill(~allowed.repeat_interleave(2, dim=1), -torch.inf)
        chosen = biased.topk(self.TOP).indices
        weights = scores.gather(1, chosen).to(x.dtype)
        load = F.one_hot(chosen, self.EXPERTS).sum((0, 1))
        taken = torch.arange(chosen.numel(), device=x.device)[chosen.flatten().argsort()]
        order = torch.empty_like(taken).index_put_((taken,), torch.arange(len(taken)))
        up = torch.einsum("nd,edf->enf", rows, self.up)[chosen.flatten(), taken // self.TOP]
        parts = torch.einsum("nf,nfd->nd", F.silu(up), self.down[chosen.flatten()])[order]
        mixed = (parts.unflatten(0, chosen.shape) * weights[..., None]).sum(1)
        return mixed.view_as(x) * (load > 0).any()


class Model(nn.Module):
    """One layer of each kind, an embedding that the head shares, integers in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, HIDDEN, padding_idx=0)
        self.linear = KimiDeltaAttention(HIDDEN, K, H)
        self.attention = LatentAttention()
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN, padding=3)
        self.experts = Experts()
        self.head = nn.Linear(HIDDEN, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding(ids)
        x = x + self.linear(x)
        x = x + self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = x + self.attention(x, positions, (ids != 0)[:, None].expand(-1, ids.shape[1], -1))
        logits = self.head(x + self.experts(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0), logits


@pytest.fixture
def model() -> Model:
    return Model().to(BF16).eval()


@pytest.fixture
def ids() -> Tensor:
    ids = torch.randint(1, 50, (2, TOKENS))
    ids[0, :3] = 0
    return ids


@COMPLEX
def test_a_model_for_inference(model: Model, ids: Tensor) -> None:
    with torch.no_grad():
        explanation = kda_ops.explain(model, ids)
    layer, rest = explanation.layers
    assert explanation.failures == ("", "")
    assert (layer.path, layer.kind) == ("linear", "KimiDeltaAttention")
    assert [fired.rewrite for fired in layer.fired] == ["chunk_kda_gated", "chunk_norms"]
    for name, part in zip(layer.after.launches, PREFILL, strict=True):
        assert part in name
    assert rest.title == "outside of the layers"
    assert rest.before.launches == rest.after.launches
    assert "torch.ops.aten.scaled_dot_product_attention.default" in rest.after.calls
    assert "extern_kernels.convolution" in rest.after.calls
    assert "for_cpu" not in str(explanation)
    assert not model.attention.cache.any()  # nothing ran


@COMPLEX
def test_a_model_in_training(model: Model, ids: Tensor) -> None:
    explanation = kda_ops.explain(model.train(), ids, labels=ids, dynamic=True)
    layer, rest = explanation.layers
    assert explanation.failures == ("", "")
    assert "chunk_kda_training" in [fired.rewrite for fired in layer.fired]
    assert "backward_prepare_kernel" in layer.after.launches  # it saves for the gradient
    assert not {"gate_cumsum_kernel", "chunk_prepare_kernel"} & {*layer.after.launches}
    assert [name for name in rest.after.launches if "native_dropout" in name]
    assert {p.grad for p in model.parameters()} == {None}


def gated(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Tensor:
    G = kda_ops.gate_cumsum(x, A_log)
    return kda_ops.chunk_kda(q, k, v, G, torch.sigmoid(beta.float()))[0]


def test_without_code_the_rewrites_are_reported() -> None:
    """Code can be generated neither without nor with the rewrites."""
    error = NotImplementedError("no such instruction\n\nSet TORCHDYNAMO_VERBOSE=1")
    with mock.patch.object(GraphLowering, "codegen", side_effect=error):
        explanation = kda_ops.explain(gated, *heads())
    (layer,) = explanation.layers
    assert [fired.rewrite for fired in layer.fired] == ["chunk_kda_gated"]
    assert "chunk_kda" in [node.operator for node in layer.before.graph]
    assert "chunk_kda_gated" in [node.operator for node in layer.after.graph]
    assert explanation.launches == (0, 0)
    why = "NotImplementedError: no such instruction"
    assert all(failure.endswith(why) for failure in explanation.failures)
    text = str(explanation)
    assert "launches       unknown -> unknown" in text
    assert "intermediates  unknown -> unknown\n" in text
    assert text.splitlines()[-1].startswith("whole graph: no code with or without the rewrites: ")
    assert text.endswith(why)
    assert "<td>unknown</td>" in explanation.to_html()
    assert "VERBOSE" not in text


def test_only_the_code_with_the_rewrites_may_fail() -> None:
    codegen = GraphLowering.codegen

    def once(self: GraphLowering) -> Any:
        if any("chunk_kda_gated" in str(node.target) for node in self.graph.nodes):
            raise RuntimeError("no such instruction")
        return codegen(self)

    with mock.patch.object(GraphLowering, "codegen", once):
        explanation = kda_ops.explain(gated, *heads())
    assert explanation.failures[0] == ""
    assert explanation.launches[0] > 0
    (layer,) = explanation.layers
    assert f"launches       {len(layer.before.launches)} -> unknown" in str(explanation)
    assert layer.bytes_saved == 0
    assert "whole graph: no code with the rewrites: " in explanation.summary()


def test_a_failure_before_the_rewrites_shows_the_graph() -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not on this device")

    with mock.patch("torch._inductor.compile_fx.view_to_reshape", fails):
        explanation = kda_ops.explain(gated, *heads())
    (layer,) = explanation.layers
    assert layer.fired == ()
    assert {"gate_cumsum", "chunk_kda"} <= {node.operator for node in layer.before.graph}
    assert "RuntimeError: not on this device" in explanation.summary()


MASK = torch.tensor([True, False, True])
INDEX = torch.tensor([2, 0])
KEYS = [
    0, -1, slice(1, None), ..., None, True, False, (), [0, 2], INDEX, MASK,
    (..., slice(0, 2)), (0, ..., 1), (slice(None), INDEX), (INDEX, slice(None), INDEX),
    (INDEX, None, INDEX), (slice(None), torch.arange(20).view(4, 5) % 3 == 0), (..., INDEX),
    (None, INDEX, 1),
    (0, INDEX), ([0, 1], [1, 2]), (True, INDEX), (slice(None, None, 2), None, ..., -1), (MASK, 1),
    torch.tensor(1), (slice(None), torch.tensor(1), INDEX), (slice(None), slice(-2, None), 3),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_by_operators_is_indexing(key: Any) -> None:
    x = torch.arange(60.0).reshape(3, 4, 5)
    assert torch.equal(get(x, key), x[key])
    written, expected = x.clone(), x.clone()
    for value in (7.0, torch.rand_like(x[key])):
        put(written, key, value)
        expected[key] = value
        assert torch.equal(written, expected)


def test_methods_of_fake_tensors_on_cuda() -> None:
    """What a PyTorch built without CUDA rejects; real tensors are unaffected."""
    real = torch.arange(12.0).reshape(3, 4)
    with FakeTensorMode(), unguarded():
        x = torch.empty(3, 4, device="cuda:0")
        assert x.t().contiguous().stride() == (3, 1)
        assert x.contiguous() is x
        assert x.copy_(torch.empty(4, device="cuda:0")) is x
        assert x.copy_(1.0) is x
        x[1:, 0] = 2.0
        assert x[1:, 0].shape == (2,)
        assert x[...] is not x
        made = x.new_tensor([1, 2])
        assert (made.device, made.dtype) == (x.device, x.dtype)
    with unguarded():
        assert torch.equal(real[1:, 0], torch.tensor([4.0, 8.0]))
        assert torch.equal(torch.nonzero(real > 9), torch.tensor([[2, 2], [2, 3]]))
    assert "__getitem__" not in vars(torch.Tensor)
