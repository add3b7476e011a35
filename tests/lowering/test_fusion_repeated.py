"""When queries and keys repeated for the value heads are used unrepeated, and when not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from tests.support.rewritten import Rewritten, rewritten

H, HV, K, W, T, SLOTS = 2, 4, 8, 4, 3, 5
KEY, VALUE = H * K, HV * K
D = 2 * KEY + VALUE
Repeat = Callable[[Tensor], Tensor]


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(HV // H, dim=2)


def expanded(x: Tensor) -> Tensor:
    """As einops has it, `... h d -> ... (h g) d`."""
    return x[:, :, :, None].expand(-1, -1, -1, HV // H, -1).reshape(*x.shape[:2], HV, K)


def prefill(repeat: Repeat, of_keys: Repeat | None = None, normed_after: bool = False) -> Any:
    def call(x: Tensor, weight: Tensor, G: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
        q, k, v = kda_ops.short_conv(x, weight).split([KEY, KEY, VALUE], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, K)) for y in (q, k, v))
        repeats = repeat, of_keys or repeat
        if normed_after:
            q, k = (kda_ops.l2norm(r(y)) for r, y in zip(repeats, (q, k), strict=True))
        else:
            q, k = (r(kda_ops.l2norm(y)) for r, y in zip(repeats, (q, k), strict=True))
        return kda_ops.chunk_kda(q, k, v, -G.abs(), beta)[0]

    return call


def compiled(function: Any, dynamic: bool = False) -> Rewritten:
    torch.manual_seed(0)
    gates = torch.randn(1, T, HV, K), torch.rand(1, T, HV)
    lengths = {0: 1, 2: 1, 3: 1} if dynamic else False
    return rewritten(function, torch.randn(1, T, D), torch.randn(D, W), *gates, dynamic=lengths)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("normed_after", [False, True])
@pytest.mark.parametrize("repeat", [interleaved, expanded])
def test_the_unrepeated_heads_come_from_the_convolution(
    repeat: Repeat, normed_after: bool, dynamic: bool
) -> None:
    found = compiled(prefill(repeat, normed_after=normed_after), dynamic)
    assert found.fired == ["repeated_heads", "short_conv_qkv"]
    assert found.operators == ["short_conv_qkv", "chunk_kda"]
    assert (found.refused, found.copies) == ([], 0)


def test_a_step_is_one_operator() -> None:
    def step(x, f, beta, z, conv, state, state_indices, cu, weight):
        y = kda_ops.short_conv_update(x, conv, weight, state_indices=state_indices, cu_seqlens=cu)[
            None
        ]
        q, k, v = (y.unflatten(-1, (-1, K)) for y in y.split([KEY, KEY, VALUE], dim=-1))
        q, k = (kda_ops.l2norm(interleaved(y)) for y in (q, k))
        g, beta = kda_ops.gate(f, None, lower_bound=-5.0), torch.sigmoid(beta)
        o = kda_ops.recurrent_kda(q, k, v, g, beta, state, state_indices, cu_seqlens=cu)
        return kda_ops.rms_norm_gated(o, z, z.new_ones(K))

    heads = [torch.randn(1, T, HV, K) for _ in range(2)]
    states = torch.randn(SLOTS, W - 1, D), torch.randn(SLOTS, HV, K, K)
    state_indices, cu = torch.tensor([2, 1, 4]), torch.arange(T + 1, dtype=torch.int32)
    inputs = (
        torch.randn(T, D),
        heads[0],
        torch.randn(1, T, HV),
        heads[1],
        *states,
        state_indices,
        cu,
    )
    found = rewritten(step, *inputs, torch.randn(D, W), written=(4, 5))
    assert found.operators == ["kda_decode"]
    assert (found.refused, found.copies) == ([], 0)


def tiled(x: Tensor) -> Tensor:
    """All heads repeated, instead of each head twice."""
    return x.repeat(1, 1, HV // H, 1)


def along_tokens(x: Tensor) -> Tensor:
    return x[:, :1, None].expand(-1, -1, HV // H, -1, -1).reshape(1, 1, HV, K).expand(1, T, HV, K)


def of_halves(x: Tensor) -> Tensor:
    """Each half of a head twice, regrouped to as many heads of the same width."""
    halves = x.unflatten(-1, (2, K // 2))[..., None, :]
    return halves.expand(-1, -1, -1, -1, 2, -1).reshape(1, T, HV, K)


@pytest.mark.parametrize("repeat", [tiled, along_tokens, of_halves])
def test_other_repetitions_stay(repeat: Repeat) -> None:
    found = compiled(prefill(repeat))
    assert "repeated_heads" not in found.fired
    assert found.operators[-1] == "chunk_kda"


def test_a_norm_over_other_heads_than_were_repeated_stays() -> None:
    def norm_of_pairs(x: Tensor) -> Tensor:
        return kda_ops.l2norm(interleaved(x).flatten(-2).unflatten(-1, (H, 2 * K))).view(
            1, T, HV, K
        )

    assert "repeated_heads" not in compiled(prefill(norm_of_pairs)).fired


def test_differently_repeated_keys_stay() -> None:
    found = compiled(prefill(interleaved, of_keys=tiled))
    assert found.operators == ["short_conv_qkv", "chunk_kda"]
    assert found.refused == [("repeated_heads", "k is not repeated")]

    def one_head(x: Tensor) -> Tensor:
        return x[:, :, :1].repeat_interleave(HV, dim=2)

    found = compiled(prefill(interleaved, of_keys=one_head))
    assert ("repeated_heads", "q has 2 heads before it is repeated, k 1") in found.refused


def test_other_users_of_the_repeated_heads_keep_them() -> None:
    def call(x: Tensor, weight: Tensor, G: Tensor, beta: Tensor) -> Any:
        q, k, v = kda_ops.short_conv(x, weight).split([KEY, KEY, VALUE], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, K)) for y in (q, k, v))
        q, k = (interleaved(kda_ops.l2norm(y)) for y in (q, k))
        return kda_ops.chunk_kda(q, k, v, -G.abs(), beta)[0], k

    found = compiled(call)
    assert "repeated_heads" not in found.fired
    assert "is returned" in found.refused[0][1]
