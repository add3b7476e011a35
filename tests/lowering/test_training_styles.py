"""Layers of other projects train like ours: what they write in plain PyTorch becomes operators
before autograd, so that the fused recurrence has its gradient, and nothing else is saved.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kda_ops
from tests.lowering.styles import fla, in_bf16, torchtitan, transformers
from tests.lowering.test_training import step, stepped
from tests.support.fake_cuda import cuda_code
from tests.support.launches import GEMMS, SAVING, summary
from tests.support.oracle import assert_close
from tests.support.training import trained

HIDDEN, K, H, T = 64, 64, 2, 70
TRAINING = "chunk_kda_training"
PLAIN = ["plain_l2norm", "plain_l2norm", "plain_gate", "plain_rms_norm_gated"]
FUSED = ["short_conv", "chunk_kda_gated", "rms_norm_gated"]


def layer_of(style: str) -> nn.Module:
    torch.manual_seed(0)
    if style == "torchtitan":
        return in_bf16(torchtitan.KDA(HIDDEN, K, H))
    if style == "transformers":
        return in_bf16(transformers.KimiLinearDeltaAttention(HIDDEN, K, H))
    return in_bf16(fla.KimiDeltaAttention(HIDDEN, K, H, 2 * H, conv_bias=True, lower_bound=-5.0))


def input_of(style: str) -> Tensor:
    shape = (T, HIDDEN) if style == "torchtitan" else (1, T, HIDDEN)
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


def gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = call(inputs[0])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def check(call: Any, module: Any, x: Tensor) -> None:
    """Holds the compiled output and all gradients to eager fp32, to which the styles cast."""
    results = gradients(call, [x, *module.parameters()])
    low = gradients(module, [x, *module.parameters()])
    wide = copy.deepcopy(module).float()
    high = gradients(wide, [x.detach().float().requires_grad_(), *wide.parameters()])
    for result, eager, exact in zip(results, low, high, strict=True):
        assert_close(result, eager, exact, x.dtype)


FIRED = {
    "fla": ["training_convs", *PLAIN, TRAINING],
    "transformers": [*PLAIN, TRAINING],
    "torchtitan": ["plain_rms_norm_gated", TRAINING],
}


@pytest.mark.parametrize("style", FIRED)
def test_styles_train_as_ours(style: str) -> None:
    module, x = layer_of(style), input_of(style)
    call, found = trained(module)
    check(call, module, x)
    assert len(found.graphs) == 2
    assert sorted(found.fired) == sorted(FIRED[style])
    assert found.operators(0) == FUSED
    assert sorted(found.operators(1)) == sorted(f"{name}_backward" for name in FUSED)


@pytest.mark.parametrize(("style", "taps"), [("fla", 2), ("torchtitan", 1)])
def test_launches(style: str, taps: int) -> None:
    """Those of our layer, and one for each tensor of taps that is put together."""
    module, x = layer_of(style), input_of(style)
    _, sources = cuda_code(module, x, backward=True)
    forward, backward = map(summary, sources)
    assert [name for name in forward.externs if name not in GEMMS] == []
    copies = [name for name in forward.launches if "cat" in name]
    assert len(copies) == taps, str(forward)
    rest = [name for name in forward.launches if "cat" not in name]
    for name, part in zip(rest, SAVING, strict=True):
        assert part in name, str(forward)
    assert len(backward.launches) <= 14, str(backward)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def frozen(x: Tensor) -> Tensor:
    """Normed by a scale without a gradient."""
    with torch.no_grad():
        scale = torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    return x * scale


def detached(x: Tensor) -> Tensor:
    """Normed by a scale that is cut off; so is `x.data`."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6).detach()


def written(x: Tensor) -> Tensor:
    """What is normed has been written in place."""
    x = x.clone()
    x.mul_(1.5)
    return normed(x)


def cast(x: Tensor) -> Tensor:
    """Normed where autocast is entered in the graph; it casts neither."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        return normed(x)


def noisy(x: Tensor) -> Tensor:
    """Normed after noise, which tracing must not draw."""
    return normed(x + 0 * torch.randn(x.shape[-1]).to(x.dtype))


@pytest.mark.parametrize("norm", [normed, cast, noisy])
def test_plain_norms_are_operators(norm: Callable[[Tensor], Tensor]) -> None:
    found = stepped(step(normed=norm), torch.float32)
    assert "chunk_kda_gated_backward" in found.operators(1)
    assert found.operators(1).count("l2norm_backward") == 2


@pytest.mark.parametrize("norm", [frozen, detached, written])
def test_what_is_not_the_operator_stays(norm: Callable[[Tensor], Tensor]) -> None:
    """Right, and without the operator, and nothing says that it fired."""
    found = stepped(step(normed=norm), torch.float32)
    assert "l2norm" not in [*found.operators(0), *found.operators(1)]
    assert "plain_l2norm" not in found.fired
    if norm is written:
        assert "what it reads is written in place" in dict(found.refused)["plain_l2norm"]


def convolved(change: Callable[[Tensor], Tensor], follow: Callable[[Tensor], Tensor]) -> Any:
    """Three convolutions; the values are changed between those of the keys and their own."""

    def call(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Tensor:
        shape, taps = q.shape, x[0, :4].flatten(1).T
        q, k, v = (y.flatten(2) * 1 for y in (q, k, v))
        q, k = kda_ops.short_conv(q, taps), kda_ops.short_conv(k, taps)
        v = kda_ops.short_conv(change(v), taps)
        q, k, v = (follow(y).reshape(shape) for y in (q, k, v))
        return step()(q, k, v, x, beta, A_log)

    return call


def padded(v: Tensor) -> Tensor:
    v[:, :5] = 0
    return v


def halved(v: Tensor) -> Tensor:
    """In memory, which autograd does not see."""
    v.detach().mul_(0.5)
    return v


def rows(y: Tensor) -> Tensor:
    """One for each head, which only a contiguous tensor can be viewed as."""
    return y.view(-1, K)


def strided(y: Tensor) -> Tensor:
    return y.as_strided(y.shape, (T * H * K, H * K, 1))


@pytest.mark.parametrize(
    ("change", "follow", "count"),
    [
        (Tensor.contiguous, rows, 1),
        (padded, rows, 3),
        (halved, rows, 3),
        (Tensor.contiguous, strided, 3),
    ],
    ids=["rows", "padded", "halved", "strided"],
)
def test_separate_convolutions(change: Any, follow: Any, count: int) -> None:
    """They are one where what reads them takes slices, and nothing is written meanwhile."""
    found = stepped(convolved(change, follow), torch.float32)
    assert found.operators(0).count("short_conv") == count


def test_no_patterns_wanted() -> None:
    with torch._inductor.config.patch(pattern_matcher=False):
        found = stepped(step(normed=normed), torch.float32)
    assert found.fired == []


def test_sizes_that_change() -> None:
    """Of batch and length, with nothing compiled anew."""
    call, found = trained(step(normed=normed))
    for B, length in ((2, T), (3, 40)):
        shapes = [(B, length, H, K)] * 4 + [(B, length, H), (H,)]
        inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
        for x in inputs[:5]:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        call(*inputs).backward()
        results = [x.grad for x in inputs]
        eager = torch.autograd.grad(step(normed=normed)(*inputs), inputs)
        for result, expected in zip(results, eager, strict=True):
            torch.testing.assert_close(result, expected)
    assert len(found.graphs) == 2
    assert found.operators(0).count("l2norm") == 2


def test_checkpointed_blocks() -> None:
    """A checkpoint's own graph is rewritten as well."""

    def block(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(step(normed=normed), *args, use_reentrant=False)

    found = stepped(block, torch.bfloat16)
    assert found.fired == ["plain_l2norm", "plain_l2norm", TRAINING]
