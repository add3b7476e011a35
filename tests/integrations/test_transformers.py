"""Models of transformers, accelerated: what they compute, and what stays as it was."""

import copy
import functools
import pickle
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, StaticCache
from transformers.monkey_patching import get_patch_mapping

from kda_ops.integrations import transformers as integration
from kda_ops.integrations.transformers import (
    KNOWN,
    LAYERS,
    accelerate,
    accelerated,
    register,
    restore,
    unregister,
)
from tests.support.transformers_models import (
    bailing,
    glm,
    kimi,
    kimi_linear,
    kimi_moe,
    prompt,
    relative_error,
)

FP32 = 2e-6  # of the largest logit
GRADIENTS = 5e-5  # of the largest entry: those of the gates are sums that mostly cancel
MODELS = [kimi, kimi_moe, bailing, glm]
WITH_A_HEAD = [kimi, kimi_moe, bailing]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=160),
}


def kda_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if type(layer).__name__ in LAYERS]


def output(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Logits, or of a model without a head its hidden states."""
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def in_pieces(model: Any, ids: Tensor, cuts: list[int], cache: Cache, **kwargs: Any) -> Tensor:
    """The output of a prompt that is given piece by piece, with the mask of what came so far."""
    mask, pieces, start = kwargs.pop("attention_mask", None), [], 0
    for piece in ids.tensor_split(cuts, dim=1):
        start += piece.shape[1]
        masked = {} if mask is None else {"attention_mask": mask[:, :start]}
        pieces.append(output(model, piece, cache=cache, **masked, **kwargs))
    return torch.cat(pieces, dim=1)


def padded(batch: int, tokens: int, side: str) -> Tensor:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return mask


# ---------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("build", MODELS)
def test_logits_without_a_cache(build: Callable[[], nn.Module]) -> None:
    model, ids = build(), prompt(2, 70)
    for masked in ({}, *({"attention_mask": padded(2, 70, side)} for side in ("left", "right"))):
        expected = output(model, ids, use_cache=False, **masked)
        with accelerated(model):
            found = output(model, ids, use_cache=False, **masked)
        assert not torch.equal(found, expected)  # something else computed it
        assert relative_error(found, expected) < FP32


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("build", MODELS)
def test_logits_with_a_cache(build: Callable[[], nn.Module], kind: str) -> None:
    """Prompts shorter than the convolution, single tokens, pieces over chunk boundaries."""
    model, ids = build(), prompt(2, 90)
    for cuts in ([1, 2, 4, 70], [2, 3, 67, 69], [5, 69]):
        expected = in_pieces(model, ids, cuts, CACHES[kind](model))
        with accelerated(model):
            cache = CACHES[kind](model)
            found = in_pieces(model, ids, cuts, cache)
            cache.reset()
            again = in_pieces(model, ids, cuts, cache)
        assert relative_error(found, expected) < FP32
        assert torch.equal(again, found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_pieces(side: str) -> None:
    """A mask that reaches into the second piece of a prompt."""
    model, ids, mask = kimi(), prompt(2, 90), padded(2, 90, side)
    cuts = [3, 50] if side == "left" else [50, 87]
    expected = in_pieces(model, ids, cuts, DynamicCache(config=model.config), attention_mask=mask)
    with accelerated(model):
        cache = DynamicCache(config=model.config)
        found = in_pieces(model, ids, cuts, cache, attention_mask=mask)
    assert relative_error(found, expected) < FP32


@pytest.mark.parametrize("build", MODELS)
def test_a_cache_changes_hands(build: Callable[[], nn.Module]) -> None:
    """A prefill and what follows it, accelerated or not, in any order."""
    model, ids = build(), prompt(2, 90)
    expected = in_pieces(model, ids, [70, 71], DynamicCache(config=model.config))
    for order in ((accelerate, restore, accelerate), (restore, accelerate, restore)):
        cache, pieces = DynamicCache(config=model.config), []
        for change, piece in zip(order, ids.tensor_split([70, 71], dim=1), strict=True):
            pieces.append(output(change(model), piece, cache=cache))
        # sums in another order: 9 eps on some CPUs
        assert relative_error(torch.cat(pieces, dim=1), expected) < 1e-5
        restore(model)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 16},
    "without a cache": {"use_cache": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", WITH_A_HEAD)
def test_generate(build: Callable[[], Any], mode: str) -> None:
    model, ids, mask = build(), prompt(2, 37), padded(2, 37, "left")

    def generated() -> Tensor:
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, **MODES[mode]}
        return model.generate(ids, attention_mask=mask, **settings)

    expected = generated()
    with accelerated(model):
        assert torch.equal(generated(), expected)


@pytest.mark.parametrize("build", MODELS)
def test_as_exact_as_the_model(build: Callable[[], nn.Module]) -> None:
    """A layer against itself in fp64, which the model's own formulas do not know."""
    torch.manual_seed(0)
    layer = kda_layers(build())[0]
    hidden_states = torch.randn(2, 150, 32)
    with torch.no_grad():
        unmodified = layer(hidden_states)
        found = accelerate(layer)(hidden_states)
        exact = copy.deepcopy(layer).double()(hidden_states.double())
    error = (unmodified - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (error + rounding)


@pytest.mark.parametrize("build", MODELS)
def test_sixteen_bits(build: Callable[[], nn.Module]) -> None:
    """Of bf16 weights, a prefill and a decode are as close to fp32 as the model's own are."""
    model, ids = build(), prompt(2, 90)
    exact = in_pieces(model, ids, [70, 71], DynamicCache(config=model.config))
    model = model.bfloat16()
    unmodified = in_pieces(model, ids, [70, 71], DynamicCache(config=model.config)).float()
    with accelerated(model):
        found = in_pieces(model, ids, [70, 71], DynamicCache(config=model.config))
    assert found.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error = (unmodified - exact).abs().max()
    assert (found.float() - exact).abs().max() <= 2 * (error + rounding)


@pytest.mark.parametrize("build", MODELS)
def test_gradients(build: Callable[[], nn.Module]) -> None:
    """Of every parameter, also through a cache, as a model in training makes one by default."""
    model, ids, mask = build(), prompt(2, 70), padded(2, 70, "right")

    def gradients(**settings: Any) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(ids, attention_mask=mask, **settings)[0]
        (out * torch.linspace(-1, 1, out.numel()).cos().view_as(out)).sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    expected = gradients(use_cache=False)
    for settings in ({"use_cache": False}, {"use_cache": True}):
        with accelerated(model):
            found = gradients(**settings)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert relative_error(x, expected[name]) < GRADIENTS, name


def test_gradient_checkpointing() -> None:
    model, ids = accelerate(kimi()).train(), prompt(2, 70)

    def gradient() -> Tensor:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return kda_layers(model)[0].q_proj.weight.grad.clone()

    expected = gradient()
    model.activation_checkpointing_enable()
    assert relative_error(gradient(), expected) < FP32


def test_packed_sequences() -> None:
    """What the layers without flash-linear-attention refuse."""
    layer = accelerate(kda_layers(kimi())[0])
    hidden_states, lengths = torch.randn(1, 90, 32), [1, 66, 2, 21]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        apart = torch.cat([layer(x) for x in hidden_states.split(lengths, dim=1)], dim=1)
        found = layer(hidden_states, cu_seqlens=cu_seqlens)
    assert relative_error(found, apart) < FP32


@pytest.mark.parametrize("name", ["cache_params", "cache"])
def test_both_names_of_a_cache(name: str) -> None:
    model = accelerate(kimi())
    layer, cache = kda_layers(model)[0], DynamicCache(config=model.config)
    with torch.no_grad():
        layer(torch.randn(2, 5, 32), **{name: cache})
    assert cache.get_recurrent_state(0).shape == (2, 3, 16, 16)
    assert cache.get_conv_state(0).shape == (2, 3 * 48, 4)


def test_a_decode_step_is_in_place() -> None:
    """On the tensors of the cache; where autograd records, by the differentiable operators."""
    model = accelerate(kimi())
    layer, caches = kda_layers(model)[0], [DynamicCache(config=model.config) for _ in range(2)]
    x = torch.randn(2, 41, 32)
    found = []
    for cache, grad in zip(caches, (False, True), strict=True):
        with torch.no_grad():
            layer(x[:, :40], cache=cache)
        states = cache.get_conv_state(0), cache.get_recurrent_state(0)
        before = [state.data_ptr() for state in states]
        with torch.set_grad_enabled(grad):
            found.append(layer(x[:, 40:], cache=cache))
        assert found[-1].requires_grad == grad
        assert [state.data_ptr() for state in states] == before
        assert (states[0][..., -1] != 0).all()
    assert relative_error(*found) < FP32
    for state in ("get_conv_state", "get_recurrent_state"):
        first, second = (getattr(cache, state)(0).detach() for cache in caches)
        assert relative_error(first[..., 1:], second[..., 1:]) < FP32


def test_nothing_of_fla_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it installed, unmodified layers call Triton's kernels, which a CPU does not have."""

    def kernel(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    model, ids = kimi(), prompt(2, 40)
    for name in vars(kimi_linear).keys() & {
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    }:
        monkeypatch.setattr(kimi_linear, name, kernel)
    with pytest.raises(RuntimeError, match="active drivers"):
        output(model, ids)
    accelerate(model)
    in_pieces(model, ids, [38, 39], DynamicCache(config=model.config))


# ---------------------------------------------------------------------- what stays


@pytest.mark.parametrize("build", MODELS)
def test_restore_leaves_no_trace(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = [(name, module, type(module), dict(vars(module))) for name, module in
              model.named_modules()]  # fmt: skip
    keys = list(model.state_dict())
    known = [module for module in model.modules() if type(module).__name__ in KNOWN]
    assert set(known) > set(kda_layers(model)) or build is glm
    assert accelerate(model) is model
    assert list(model.state_dict()) == keys
    changed = [(name, module, type(module)) for name, module in model.named_modules()]
    assert [module for _, module, _ in changed] == [module for _, module, *_ in before]
    assert {module for (_, module, cls), (*_, old, _) in zip(changed, before, strict=True)
            if cls is not old} == set(known)  # fmt: skip
    for (_, _, cls), (_, _, old, _) in zip(changed, before, strict=True):
        assert issubclass(cls, old)
        assert cls.__name__ == old.__name__
    accelerate(model)  # twice is as good as once
    assert restore(model) is model
    after = [(name, module, type(module), dict(vars(module))) for name, module in
             model.named_modules()]  # fmt: skip
    assert after == before
    assert get_patch_mapping() == {}
    restore(model)


def test_with_gives_back_what_it_changed() -> None:
    model = kimi()
    first, second = kda_layers(model)
    old = type(first)
    accelerate(first)
    with accelerated(model) as same:
        assert same is model
        assert type(second) is type(first) is not old
    assert type(second) is old
    with pytest.raises(TypeError), accelerated(model):
        output(model, "not tokens")
    assert type(second) is old
    assert type(first) is not old


def test_hooks_and_wrappers_are_called() -> None:
    """Hooks of torch, and a forward put behind hooks as accelerate does it, before or after."""
    model, calls = kimi(), []
    first, second = kda_layers(model)
    first.register_forward_hook(lambda *_: calls.append("hook"))
    first.f = first.forget_gate.f_a_proj.register_forward_pre_hook(lambda *_: calls.append("f"))

    def wrap(layer: Any, name: str) -> None:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return module._old_forward(*args, **kwargs)

        layer._old_forward = layer.forward
        layer.forward = functools.update_wrapper(
            functools.partial(forward, layer), layer._old_forward
        )

    wrap(first, "before")
    original = second.forward
    ids = prompt(1, 20)
    expected = output(model, ids)
    calls.clear()
    accelerate(model)
    wrap(second, "after")
    found = output(model, ids)
    assert calls == ["before", "f", "hook", "after"]
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < FP32
    restore(model)
    assert first._old_forward.__func__ is second._old_forward.__func__ is original.__func__
    assert torch.equal(output(model, ids), expected)


def test_parameters_that_are_read_directly_are_loaded() -> None:
    """Offloading moves the weights of a module in by a hook on the module."""
    model, seen = accelerate(kimi()), []
    layer = kda_layers(model)[0]
    for name in ("conv1d", "forget_gate", "o_norm"):
        hook = types.SimpleNamespace(
            pre_forward=lambda module, name=name: seen.append(name),
            post_forward=lambda module, output: seen.append(None),
        )
        getattr(layer, name)._hf_hook = hook
    output(layer, torch.randn(1, 5, 32))
    assert seen == ["conv1d", "forget_gate", "o_norm", None, None, None]


def test_copies_and_pickles() -> None:
    model, ids = accelerate(kimi()), prompt(1, 20)
    expected = output(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(x) for x in kda_layers(other)] == [type(x) for x in kda_layers(model)]
        assert torch.equal(output(other, ids), expected)


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()
    assert get_patch_mapping() == {}


@pytest.mark.parametrize("build", WITH_A_HEAD)
def test_loading(build: Callable[[], Any], tmp_path: Path, registered: None) -> None:
    """`from_pretrained` of what an accelerated model has saved, registered and not."""
    model, ids = build(), prompt(1, 20)
    expected = output(model, ids)
    accelerate(model).save_pretrained(tmp_path)
    register()  # twice is as good as once
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [type(x) for x in kda_layers(loaded)] == [type(x) for x in kda_layers(model)]
    assert relative_error(output(loaded, ids), expected) < FP32
    built = AutoModelForCausalLM.from_config(model.config)
    assert type(kda_layers(built)[0]) is type(kda_layers(model)[0])
    unregister()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [type(x) for x in kda_layers(loaded)] == [type(x) for x in kda_layers(build())]
    register()


def test_register_keeps_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import monkey_patching

    other = {"KimiLinearDeltaAttention": nn.Identity}
    monkeypatch.setattr(monkey_patching, "_monkey_patch_mapping_cache", dict(other))
    with pytest.raises(ValueError, match="already has a patch mapping"):
        register()
    unregister()
    assert get_patch_mapping() == other


# ---------------------------------------------------------------------- errors


def test_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"must have layers of Kimi.*, got Linear without any"):
        accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (bailing, {"kda_lower_bound": -8.0}, r"layers.0.self_attn cannot .*lower_bound .*-8"),
        (kimi, {"hidden_act": "gelu"}, r"layers.0.self_attn cannot .*activation .*gelu"),
        (kimi, {"linear_head_dim": 260}, r"layers.0.self_attn must .*at most 256, got 260"),
    ],
)
def test_layers_that_operators_do_not_take(
    build: Callable[..., nn.Module], settings: dict[str, Any], message: str
) -> None:
    model = build(**settings)
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert not any(isinstance(x, integration.KDALayer) for x in model.modules())


def test_a_bound_that_is_not_used() -> None:
    model, ids = bailing(kda_safe_gate=False, kda_lower_bound=-8.0), prompt(1, 70)
    expected = output(model, ids)
    assert relative_error(output(accelerate(model), ids), expected) < FP32


def test_a_forward_that_was_replaced() -> None:
    model = kimi()
    first, second = kda_layers(model)
    second.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"layers.2.self_attn must have the forward of its class"):
        accelerate(model)
    assert not isinstance(first, integration.KDALayer)


def test_packed_sequences_that_cannot_be_told_apart() -> None:
    model = accelerate(kimi())
    layer, cache, x = kda_layers(model)[0], DynamicCache(config=model.config), torch.randn(1, 6, 32)
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        layer(x, seq_idx=torch.zeros(1, 6))
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="cu_seqlens must be None with a cache"):
        layer(x, cache=cache, cu_seqlens=torch.tensor([0, 6]))


def test_no_other_names() -> None:
    assert integration.KimiLinearDeltaAttention is integration.accelerated_class(
        kimi_linear.KimiLinearDeltaAttention
    )
    with pytest.raises(AttributeError, match="has no attribute Nobody"):
        integration.Nobody  # noqa: B018
