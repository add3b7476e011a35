"""The layer in the style of FLA and of transformers compiles to the same kernels as ours, with
equal results.
"""

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from kda_ops._numerics import accumulation_dtype
from kda_ops.cache.batch import KDABatch
from kda_ops.lowering.rewrites.framework import recording
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.varlen import prepare_chunk_indices
from tests.lowering.styles import Cache, fla, in_bf16, transformers
from tests.support.fake_cuda import Summary
from tests.support.launches import DECODE, PREFILL, PREFILL_UNPACKED, expect, launches, mark_dynamic
from tests.support.oracle import assert_close

HIDDEN, K, H, PAGES = 64, 64, 2, 5
STYLES = ["fla", "transformers"]
styles = pytest.mark.parametrize("style", STYLES)
settings = pytest.mark.parametrize(
    ("layout", "lower_bound"), [("SD", None), ("DS", -5.0)], ids=["SD-softplus", "DS-bounded"]
)
sizes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
lengths = pytest.mark.parametrize("varlen", [False, True], ids=["fixed", "varlen"])
KINDS = [(layout, bound) for layout in ("SD", "DS") for bound in (None, -5.0)]


def prefill_of(style: str) -> list[str]:
    return PREFILL_UNPACKED if style == "fla" else PREFILL


class Stack(nn.Module):
    """Consecutive layers: every layout with every gate, so that one graph has them all."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(in_bf16(written(style, bound)) for _, bound in KINDS)

    def caches(self, state_indices: Tensor) -> list[Cache]:
        pairs = zip(self.layers, KINDS, strict=True)
        return [layer.cache(state_indices, PAGES, layout) for layer, (layout, _) in pairs]

    def forward(self, x: Tensor, caches: list[Cache], *how: Any) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, *how)
        return x


def written(style: str, lower_bound: float | None, K: int = K) -> Any:
    """A layer in the style of a project, with that project's options."""
    torch.manual_seed(0)
    if style == "transformers":
        return transformers.KimiLinearDeltaAttention(HIDDEN, K, H, lower_bound=lower_bound)
    more: dict[str, Any] = {"conv_bias": True, "allow_neg_eigval": lower_bound is not None}
    return fla.KimiDeltaAttention(HIDDEN, K, H, 2 * H, lower_bound=lower_bound, **more)


def ours(theirs: nn.Module) -> KimiDeltaAttention:
    """Our layer with the same weights."""
    like_fla = isinstance(theirs, fla.KimiDeltaAttention)
    layer = KimiDeltaAttention(
        HIDDEN,
        theirs.head_dim,
        H,
        num_v_heads=2 * H if like_fla else H,
        conv_bias=like_fla,
        output_gate_bias=like_fla,
        allow_neg_eigval=like_fla and theirs.allow_neg_eigval,
        lower_bound=(theirs if like_fla else theirs.forget_gate).lower_bound,
    )
    layer.load_checkpoint(theirs.state_dict())
    return layer


def prompts(T: int, caches: Any, dynamic: bool, B: int = 1, varlen: bool = True) -> Any:
    """Arguments of a prefill of a layer with its cache, or None, or of a stack with its caches."""
    x, cu, chunk_indices = torch.randn(B, T, HIDDEN, dtype=torch.bfloat16), None, None
    if varlen:
        cu = torch.tensor([0, 50, T], dtype=torch.int32)
        chunk_indices = prepare_chunk_indices(cu, T)
    if dynamic:
        mark_dynamic(x, axis=1)
        mark_dynamic(*([cu, chunk_indices] if varlen else [x] if B > 1 else []))
        mark_sequences(caches)
    return x, caches, cu, chunk_indices


def caches_of(caches: Any) -> list[Cache]:
    return caches if isinstance(caches, list) else [caches] if caches else []


def mark_sequences(caches: Any) -> None:
    for cache in caches_of(caches):
        mark_dynamic(cache.state_indices, cache.has_initial_state)


def tokens(caches: Any, dynamic: bool, varlen: bool) -> Any:
    """Arguments of a decode step, a token for each slot."""
    N = len(caches_of(caches)[0].state_indices)
    x = torch.randn(*((1, N) if varlen else (N, 1)), HIDDEN, dtype=torch.bfloat16)
    cu = torch.arange(N + 1, dtype=torch.int32) if varlen else None
    if dynamic:
        mark_dynamic(x, axis=1 if varlen else 0)
        mark_dynamic(cu)
        mark_sequences(caches)
    return x, caches, cu, None, True


def compiled(layer: nn.Module, args: Any, dynamic: bool) -> Summary:
    return launches(layer, *args, dynamic=None if dynamic else False)


@sizes
@lengths
@styles
def test_decode_is_one_launch(style: str, varlen: bool, dynamic: bool) -> None:
    stack = Stack(style)
    caches = stack.caches(torch.tensor([1, 2, 4]))
    expect(compiled(stack, tokens(caches, dynamic, varlen), dynamic), 4 * DECODE)


@sizes
@lengths
@styles
def test_prefill_is_four_launches(style: str, varlen: bool, dynamic: bool) -> None:
    stack = Stack(style)
    caches = stack.caches(torch.tensor([1, 2]))
    args = prompts(130, caches, dynamic, B=1 if varlen else 2, varlen=varlen)
    expect(compiled(stack, args, dynamic), 4 * prefill_of(style))


@sizes
@styles
def test_prefill_without_a_cache_is_four_launches(style: str, dynamic: bool) -> None:
    layer = in_bf16(written(style, -5.0))
    expect(compiled(layer, prompts(130, None, dynamic, varlen=False), dynamic), prefill_of(style))


def test_states_of_one_buffer_are_not_copied() -> None:
    """Three states that are parts of one tensor: each convolution writes its part."""
    layer = in_bf16(written("fla", None))
    for layout, axis in (("SD", 2), ("DS", 1)):
        cache = layer.cache(torch.tensor([1, 2, 4]), PAGES, layout)
        cache.conv = torch.cat(cache.conv, dim=axis).split(layer.widths, dim=axis)
        expect(compiled(layer, tokens(cache, False, True), False), DECODE)
        expect(compiled(layer, prompts(130, _two(cache), False), False), PREFILL_UNPACKED)


def _two(cache: Cache) -> Cache:
    return Cache(
        cache.conv,
        cache.recurrent,
        cache.state_indices[:2],
        cache.has_initial_state[:2],
        cache.layout,
    )


def test_an_eps_that_became_a_tensor_is_named() -> None:
    """What `dynamic=True` costs a layer with its eps in an attribute."""
    layer = in_bf16(written("transformers", None))
    with recording() as outcomes:
        launches(layer, *prompts(130, None, False, varlen=False), dynamic=True)
    reasons = {o.rewrite: o.reason for o in outcomes if o.reason is not None}
    for name in ("plain_l2norm", "plain_rms_norm_gated"):
        assert "dynamic=True" in str(reasons[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("K", [16, 64])
@settings
@styles
def test_results_equal_our_layer(
    style: str, layout: str, lower_bound: float | None, K: int, device: str
) -> None:
    """A prefill of two prompts and a decode step, compiled, against our layer in fp64."""
    theirs = in_bf16(written(style, lower_bound, K=K))
    layer = ours(theirs)
    layer.conv_layout = layout
    theirs = theirs.to(device)
    state_indices = torch.tensor([3, 1])
    cache = theirs.cache(state_indices.to(device), PAGES, layout)
    first, step = torch.randn(1, 75, HIDDEN), torch.randn(1, 2, HIDDEN)
    cu = torch.tensor([0, 70, 75], dtype=torch.int32, device=device)
    one_each = torch.arange(3, dtype=torch.int32, device=device)

    def ours_in(dtype: torch.dtype) -> list[Tensor]:
        model = layer.to(dtype)
        state = (
            torch.zeros(packed.shape, dtype=dtype),
            torch.zeros(cache.recurrent.shape, dtype=accumulation_dtype(first.to(dtype))),
        )
        batches = (
            KDABatch.prefill([70, 5], state_indices.tolist()),
            KDABatch.decode(state_indices.tolist()),
        )
        y, y2 = (
            model(x.bfloat16().to(dtype), state=state, batch=batch)
            for x, batch in zip((first, step), batches, strict=True)
        )
        return [y, y2, *state]

    with torch.no_grad(), recording() as outcomes:
        torch._dynamo.reset()
        run = torch.compile(theirs, fullgraph=True)
        with torch._inductor.config.patch(force_disable_caches=True):
            y = run(first.bfloat16().to(device), cache, cu, prepare_chunk_indices(cu, 75))
            y2 = run(step.bfloat16().to(device), cache, one_each, None, True)
        packed = cache.conv
        if style == "fla":
            packed = torch.cat(packed, dim=2 if layout == "SD" else 1)
        reference, fp64 = ours_in(torch.bfloat16), ours_in(torch.float64)
    fired = {outcome.rewrite for outcome in outcomes if outcome.reason is None}
    # the recurrence takes the norms where it is two kernels
    norms = "separate_convs" if style == "fla" else "chunk_norms" if K == 64 else "short_conv_qkv"
    assert fired >= {norms, "plain_gate", "chunk_kda_gated", "kda_decode"}
    for out, r, e in zip((y, y2, packed, cache.recurrent), reference, fp64, strict=True):
        assert_close(out, r, e, operand_dtype=torch.bfloat16)
