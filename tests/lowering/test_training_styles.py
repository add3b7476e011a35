"""Layers of other projects train like ours: what they write in plain PyTorch becomes operators
before autograd, so that the fused recurrence has its gradient, and nothing else is saved.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lowering.styles import fla, in_bf16, torchtitan, transformers
from tests.lowering.test_training import step, stepped
from tests.support.fake_cuda import cuda_code
from tests.support.launches import GEMMS, PREFILL, summary
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
    for name, part in zip(rest, PREFILL, strict=True):
        assert part in name, str(forward)
    assert len(backward.launches) <= 17, str(backward)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def frozen(x: Tensor) -> Tensor:
    """Normed by a scale without a gradient."""
    with torch.no_grad():
        scale = torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    return x * scale


def written(x: Tensor) -> Tensor:
    """What is normed has been written in place."""
    x = x.clone()
    x.mul_(1.5)
    return normed(x)


def cast(x: Tensor) -> Tensor:
    """Normed where autocast is entered in the graph; it casts neither."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        return normed(x)


@pytest.mark.parametrize("norm", [normed, cast])
def test_plain_norms_are_operators(norm: Callable[[Tensor], Tensor]) -> None:
    found = stepped(step(normed=norm), torch.float32)
    assert "chunk_kda_gated_backward" in found.operators(1)
    assert found.operators(1).count("l2norm_backward") == 2


@pytest.mark.parametrize("norm", [frozen, written])
def test_what_is_not_the_operator_stays(norm: Callable[[Tensor], Tensor]) -> None:
    """Right, and without the operator."""
    found = stepped(step(normed=norm), torch.float32)
    assert "l2norm" not in [*found.operators(0), *found.operators(1)]


def test_checkpointed_blocks() -> None:
    """A checkpoint's own graph is rewritten as well."""

    def block(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(step(normed=normed), *args, use_reentrant=False)

    found = stepped(block, torch.bfloat16)
    assert found.fired == ["plain_l2norm", "plain_l2norm", TRAINING]
