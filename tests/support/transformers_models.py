"""Small random models of transformers that have KDA layers, made with flash-linear-attention and
causal-conv1d out of sight: with them importable, unmodified layers need a GPU.
"""

import importlib
import sys

import torch
from torch import Tensor, nn

HIDDEN = ("fla", "causal_conv1d")
MODELS = ("kimi_linear", "glm5_next", "bailing_hybrid")
FILES = [f"transformers.models.{model}.modeling_{model}" for model in MODELS]

loaded = {name: sys.modules.get(name) for name in HIDDEN}
sys.modules |= dict.fromkeys(HIDDEN)  # type: ignore[arg-type]
kimi_linear, glm5_next, bailing_hybrid = map(importlib.import_module, FILES)
for name, module in loaded.items():
    del sys.modules[name]
    if module is not None:  # by another test
        sys.modules[name] = module

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "mlp_layer_types": ["dense"] * 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
LINEAR = {"linear_head_dim": 16, "linear_num_heads": 3}


def sharpened(model: nn.Module) -> nn.Module:
    """With weights that make every part count: with those of an initialisation, near zero, a layer
    adds next to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("A_log"):  # gates of at most 1.4 nats: sums of strong ones lose digits
                x.uniform_(-0.5, 0.5, generator=generator)
            elif name.endswith("dt_bias"):
                x.uniform_(-4.0, -1.5, generator=generator)
            elif x.dim() > 1:
                scale = 0.5 * x.shape[-1] ** -0.5
                scale = {"embed_tokens": 1.0, "conv1d": 0.5}.get(name.split(".")[-2], scale)
                x.copy_(torch.randn(x.shape, generator=generator) * scale)
    return model.eval()


def kimi(**settings: object) -> nn.Module:
    config = kimi_linear.KimiLinearConfig(
        **{**COMMON, **LINEAR, "qk_rope_head_dim": 8, "num_local_experts": 4, **settings}
    )
    return sharpened(kimi_linear.KimiLinearForCausalLM(config))


def kimi_moe(**settings: object) -> nn.Module:
    model = kimi(**{"mlp_layer_types": ["dense", "sparse", "sparse"], **settings})
    model.set_experts_implementation("batched_mm")  # the default one looks at routes on the host
    return model


def bailing(**settings: object) -> nn.Module:
    """Its forget gate is bounded, both gates are of full rank."""
    config = bailing_hybrid.BailingHybridConfig(
        **{**COMMON, "head_dim": 16, "qk_rope_head_dim": 8, "num_local_experts": 4, **settings}
    )
    return sharpened(bailing_hybrid.BailingHybridForCausalLM(config))


def glm(**settings: object) -> nn.Module:
    """A text model without a head, whose full attention is sparse."""
    layer_types = ["linear_attention", "indexed_attention", "linear_attention"]
    config = glm5_next.Glm5NextTextConfig(
        **{
            **COMMON,
            **LINEAR,
            "layer_types": layer_types,
            "q_lora_rank": 16,
            "n_routed_experts": 4,
            "index_topk": 32,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_kpool": 4,
            **settings,
        }
    )
    return sharpened(glm5_next.Glm5NextTextModel(config))


def prompt(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * tokens)
    return torch.randint(3, COMMON["vocab_size"], (batch, tokens), generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
