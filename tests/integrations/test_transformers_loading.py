"""`load_kimi_linear` from what transformers' `save_pretrained` writes."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kda_ops import KimiDeltaAttention, load_kimi_linear
from kda_ops.integrations.transformers import KDALayer, accelerate
from tests.support.transformers_models import (
    bailing,
    glm,
    kimi,
    kimi_linear,
    kimi_moe,
    relative_error,
)

MODELS = {"kimi": kimi, "kimi_moe": kimi_moe, "bailing": bailing, "glm": glm}


def equal(model: nn.Module, other: nn.Module) -> bool:
    found, expected = model.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(x, found[n]) for n, x in expected.items()
    )


def spoiled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(7.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str, tmp_path: Path) -> None:
    model: Any = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    other = spoiled(MODELS[name]())
    kept = next(other.parameters())
    assert load_kimi_linear(tmp_path, accelerate(other)) is other
    assert equal(other, model)
    assert next(other.parameters()) is kept  # in place: optimizers have it
    made = load_kimi_linear(tmp_path)
    assert equal(made, model)
    assert any(isinstance(x, KDALayer) for x in made.modules())


def test_our_layers_from_the_same_files(tmp_path: Path) -> None:
    """They compute what transformers' do, though its names differ on disk, and the other layers'
    tensors lie between.
    """
    model: Any = kimi()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.self_attn.q_conv1d.weight" in names
    layers = nn.ModuleList(
        KimiDeltaAttention(32, 16, 3, output_gate_bias=False) for _ in range(2)
    ).requires_grad_(False)
    load_kimi_linear(tmp_path, layers)
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        for ours, i in zip(layers, (0, 2), strict=True):
            expected = model.model.layers[i].self_attn(x)
            assert relative_error(ours(x), expected) < 2e-6


def test_what_does_not_fit_is_named_as_in_the_files(tmp_path: Path) -> None:
    model: Any = kimi_moe()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_conv1d.weight"]
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"] = torch.zeros(1, 3)
    tensors["model.layers.9.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    before = copy.deepcopy(model)
    problems = (
        "the checkpoint does not fit the model: missing model.layers.0.self_attn.k_conv1d.weight; "
        "unexpected model.layers.9.weight; model.layers.1.block_sparse_moe.experts.2.w1.weight "
        "must have shape [16, 32], got (1, 3)"
    )
    for target in (model, None):
        with pytest.raises(ValueError, match=f"^{re.escape(problems)}$"):
            load_kimi_linear(tmp_path, target)
    assert equal(model, before)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing model.*experts.2.w1.weight"):
        load_kimi_linear(tmp_path, model)


def test_a_model_without_memory(tmp_path: Path) -> None:
    """Writing to it would be silent."""
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="on the device meta: from_pretrained"),
    ):
        load_kimi_linear(tmp_path, kimi_linear.KimiLinearForCausalLM(kimi().config))


def test_a_config_is_needed_to_make_a_model(tmp_path: Path) -> None:
    kimi().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model must be given where there is no config\.json"):
        load_kimi_linear(tmp_path)
    with pytest.raises(ValueError, match="path must be a file or a directory that is there"):
        load_kimi_linear(tmp_path / "nowhere")
