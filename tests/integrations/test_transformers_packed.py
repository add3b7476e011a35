"""`accelerate(model, pack=True)`: one projection, under the names that six have."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from kda_ops.integrations.packing import PACKED
from kda_ops.integrations.transformers import KDALayer, accelerate, accelerated, restore
from tests.integrations.test_transformers import (
    FP32,
    GRADIENTS,
    MODELS,
    in_pieces,
    kda_layers,
    output,
)
from tests.support.transformers_models import bailing, kimi, prompt, relative_error


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Other weights for all parameters."""
    return {
        name: x + torch.randn_like(x) * 0.02 if x.is_floating_point() else x
        for name, x in model.state_dict().items()
    }


def assert_same_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("build", MODELS)
def test_the_same_from_fewer_products(build: Callable[[], nn.Module]) -> None:
    model, ids = build(), prompt(2, 90)
    cuts = [5, 69, 70]
    expected = in_pieces(model, ids, cuts, DynamicCache(config=model.config))
    state = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    modules = dict(model.named_modules())
    assert accelerate(model, pack=True) is model
    assert len(list(model.parameters())) == len(names) - 5 * len(kda_layers(model))
    assert_same_states(model.state_dict(), state)
    found = in_pieces(model, ids, cuts, DynamicCache(config=model.config))
    assert relative_error(found, expected) < FP32
    accelerate(model, pack=True)  # twice is as good as once
    restore(model)
    assert_same_states(model.state_dict(), state)
    assert list(model.state_dict()) == list(state)
    assert [name for name, _ in model.named_parameters()] == names
    assert dict(model.named_modules()) == modules
    for layer in kda_layers(model):
        assert not layer._state_dict_hooks
        assert not layer._load_state_dict_pre_hooks
    again = in_pieces(model, ids, cuts, DynamicCache(config=model.config))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_are_loaded_and_saved_under_their_names(assign: bool, tmp_path: Path) -> None:
    model, other, ids = kimi(), kimi(), prompt(2, 20)
    state = random_state(model)
    other.load_state_dict(state)
    accelerate(model, pack=True).load_state_dict(state, assign=assign)
    assert_same_states(model.state_dict(), state)
    expected = output(other, ids)
    assert relative_error(output(model, ids), expected) < FP32
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_states(loaded.state_dict(), state)
    restore(model)
    assert torch.equal(output(model, ids), expected)
    accelerate(model, pack=True)
    del state["model.layers.0.self_attn.k_proj.weight"]
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["model.layers.0.self_attn.packed.weight"]


def test_copies_moves_and_files() -> None:
    model, ids = accelerate(kimi(), pack=True), prompt(2, 20)
    expected = output(model, ids)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(same, ids), expected)
        assert_same_states(restore(same).state_dict(), model.state_dict())
    model.double().float()
    assert torch.equal(output(model, ids), expected)


def test_training() -> None:
    """Gradients are those of the parameters apart, side by side; the weights of a step are kept."""
    model, ids = kimi(), prompt(2, 70)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, layer = step(), "model.layers.0.self_attn"
    with accelerated(model, pack=True):
        found = step()
        names = model.get_submodule(layer).packed.names
        apart = torch.cat([expected[f"{layer}.{name}.weight"] for name in names])
        assert relative_error(found[f"{layer}.packed.weight"], apart) < GRADIENTS
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        trained = copy.deepcopy(model.state_dict())
    assert_same_states(model.state_dict(), trained)


def test_with_unpacks_what_it_packed() -> None:
    """Also layers that were accelerated before, which stay so."""
    model = accelerate(kimi())
    first, second = kda_layers(model)
    accelerate(first, pack=True)
    with accelerated(model, pack=True):
        assert hasattr(second, PACKED)
    assert [hasattr(layer, PACKED) for layer in (first, second)] == [True, False]
    assert all(isinstance(layer, KDALayer) for layer in (first, second))


@pytest.mark.parametrize("build", [kimi, bailing])
def test_compiled(build: Callable[[], nn.Module]) -> None:
    model, ids = build(), prompt(1, 70)
    expected = output(model, ids, use_cache=False)
    accelerate(model, pack=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(output(compiled, ids, use_cache=False), expected) < FP32


def with_bias(layer: Any) -> None:
    layer.b_proj = nn.Linear(32, layer.b_proj.out_features)


def hooked(layer: Any) -> None:
    layer.k_proj.register_forward_hook(lambda *_: None)


def in_bf16(layer: Any) -> None:
    layer.v_proj.bfloat16()


def frozen(layer: Any) -> None:
    layer.q_proj.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_bias, "b_proj is no nn.Linear without a bias"),
        (hooked, "k_proj has hooks"),
        (in_bf16, "v_proj.weight differs from q_proj.weight in dtype"),
        (frozen, "k_proj.weight differs from q_proj.weight in requires_grad"),
    ],
)
def test_what_is_not_packed(change: Callable[[Any], None], message: str) -> None:
    model = kimi()
    change(kda_layers(model)[-1])
    classes = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match=f"self_attn cannot be packed: {message}"):
        accelerate(model, pack=True)
    assert [type(x) for x in model.modules()] == classes
    accelerate(model)
