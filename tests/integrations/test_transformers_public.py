"""As a user would write it: transformers' public API, and one line of this package."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    KimiLinearConfig,
    set_seed,
)

CONFIG = KimiLinearConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    linear_head_dim=16,
    linear_num_heads=2,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    mlp_layer_types=["dense", "dense", "dense"],
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


@pytest.fixture(autouse=True)
def _hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """With flash-linear-attention importable, unmodified layers need a GPU."""
    for name in ("fla", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def models() -> tuple[AutoModelForCausalLM, AutoModelForCausalLM]:
    """The same weights twice, the second accelerated."""
    set_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIG).eval()
    other = AutoModelForCausalLM.from_config(CONFIG).eval()
    other.load_state_dict(plain.state_dict())

    from kda_ops.integrations.transformers import accelerate

    accelerate(other)
    return plain, other


def test_generate(models: tuple) -> None:
    inputs = {
        "input_ids": torch.randint(3, 61, (2, 70)),
        "attention_mask": torch.ones(2, 70, dtype=torch.long),
    }
    inputs["attention_mask"][1, :9] = 0
    for settings in (
        {},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 32},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.3, "output_scores": True},
    ):
        config = GenerationConfig(
            **{"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
        )
        tokens = []
        for model in models:
            set_seed(1)
            out = model.generate(**inputs, generation_config=config, return_dict_in_generate=True)
            tokens.append(out.sequences)
        assert torch.equal(*tokens), settings


def test_a_conversation(models: tuple) -> None:
    """Turn after turn on one cache, which `generate` continues."""
    turns = [torch.randint(3, 61, (1, n)) for n in (40, 7, 1, 90)]
    histories = []
    for model in models:
        cache, history = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)
        for turn in turns:
            history = torch.cat([history, turn], dim=1)
            history = model.generate(
                history, cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
        histories.append(history)
    assert torch.equal(*histories)


def test_training(models: tuple) -> None:
    """Ten steps of an optimizer end at the same loss."""
    ids = torch.randint(3, 61, (2, 70))
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_reload(models: tuple, tmp_path: Path) -> None:
    """What the accelerated model saves, transformers loads."""
    plain, other = models
    other.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(3, 61, (2, 70))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
