"""Checkpoints in four naming schemes load into one layer, and mismatches are named."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.nn.checkpoints import convert_state_dict, detect_naming
from kda_ops.nn.layer import KimiDeltaAttention

SIZES: dict[str, Any] = {"num_v_heads": 4, "expand_v": 1.5, "output_gate_bias": False}
K, V, H, HV, HIDDEN, W = 8, 12, 2, 4, 20, 4


def make_layer(**options: Any) -> KimiDeltaAttention:
    return KimiDeltaAttention(HIDDEN, K, H, **{**SIZES, **options}).requires_grad_(False)


def common() -> dict[str, Tensor]:
    """What all checkpoints call the same."""
    return {
        "q_proj.weight": torch.randn(H * K, HIDDEN),
        "k_proj.weight": torch.randn(H * K, HIDDEN),
        "v_proj.weight": torch.randn(HV * V, HIDDEN),
        "b_proj.weight": torch.randn(HV, HIDDEN),
        "o_norm.weight": torch.randn(V),
        "o_proj.weight": torch.randn(HIDDEN, HV * V),
    }


def gates() -> dict[str, Tensor]:
    """The gates under FLA's names."""
    return {
        "f_proj.0.weight": torch.randn(V, HIDDEN),
        "f_proj.1.weight": torch.randn(HV * K, V),
        "g_proj.0.weight": torch.randn(V, HIDDEN),
        "g_proj.1.weight": torch.randn(HV * V, V),
        "A_log": torch.randn(HV),
        "dt_bias": torch.randn(HV * K),
    }


def convolutions() -> dict[str, Tensor]:
    rows = {"q": H * K, "k": H * K, "v": HV * V}
    return {f"{x}_conv1d.weight": torch.randn(n, 1, W) for x, n in rows.items()}


def fla() -> dict[str, Tensor]:
    return {**common(), **gates(), **convolutions()}


def moonshot(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLA's checkpoint as Moonshot's first release names and shapes it."""
    names = {
        "f_proj.0.": "f_a_proj.", "f_proj.1.": "f_b_proj.",
        "g_proj.0.": "g_a_proj.", "g_proj.1.": "g_b_proj.",
    }  # fmt: skip
    renamed = {}
    for name, x in checkpoint.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = x
    renamed["A_log"] = checkpoint["A_log"].view(1, 1, HV, 1)
    return renamed


def hugging_face(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLA's checkpoint as transformers' KimiLinearDeltaAttention has it."""
    renamed = moonshot(checkpoint)
    parts = [renamed.pop(f"{x}_conv1d.weight") for x in "qkv"]
    renamed["conv1d.weight"] = torch.cat(parts)
    for name in [n for n in renamed if n.startswith(("f_", "A_log", "dt_bias"))]:
        renamed[f"forget_gate.{name}"] = renamed.pop(name)
    return renamed


def check(layer: KimiDeltaAttention, source: dict[str, Tensor]) -> None:
    """Every parameter of the layer is FLA's tensor of that meaning."""
    parts = dict(
        zip(
            layer.in_sizes,
            layer.in_proj.weight.split(list(layer.in_sizes.values())),
            strict=True,
        )
    )
    low_rank = {x for x in "fg" if f"{x}_proj.0.weight" in source}
    assert not parts.pop("pad").any()
    assert len(layer.in_proj.weight) % 64 == 0
    assert list(layer.in_parts()) == list(parts)
    for x, part in parts.items():
        assert torch.equal(layer.in_parts()[x], part), x
        name = f"{x}_proj.0.weight" if x in low_rank else f"{x}_proj.weight"
        assert torch.equal(part, source[name]), name
    q, k, v = layer.conv_weight.split([H * K, H * K, HV * V])
    assert torch.equal(q, source["q_conv1d.weight"][:, 0])
    assert torch.equal(k, source["k_conv1d.weight"][:, 0])
    assert torch.equal(v, source["v_conv1d.weight"][:, 0])
    assert torch.equal(layer.o_norm_weight, source["o_norm.weight"])
    own = dict(layer.named_parameters())
    for name in ("A_log", "dt_bias", "o_proj.weight"):
        assert torch.equal(own[name], source[name]), name
    rest = {"g_proj.weight", "g_proj.bias"} if "g" not in parts else set()
    expected = {f"{x}_proj.{part}" for x in low_rank for part in ("weight", "bias")} | rest
    for name in expected:
        theirs = source.get(name if name in rest else name.replace("_proj.", "_proj.1."))
        assert (name in own) == (theirs is not None), name
        assert theirs is None or torch.equal(own[name], theirs), name
    assert {name for name in own if name.startswith(("f_proj", "g_proj"))} <= expected


def test_fla() -> None:
    source, layer = fla(), make_layer()
    assert detect_naming(source) == "FLA"
    layer.load_checkpoint(source)
    check(layer, source)


def test_moonshot() -> None:
    source, layer = fla(), make_layer()
    assert detect_naming(moonshot(source)) == "Moonshot"
    layer.load_checkpoint(moonshot(source))
    check(layer, source)


def test_hugging_face() -> None:
    source, layer = fla(), make_layer()
    renamed = hugging_face(source)
    assert {"forget_gate.A_log", "forget_gate.f_b_proj.weight", "g_b_proj.weight"} < set(renamed)
    assert detect_naming(renamed) == "Hugging Face"
    layer.load_checkpoint(renamed)
    check(layer, source)


def test_own_names() -> None:
    layer, other = make_layer(), make_layer()
    assert detect_naming(layer.state_dict()) == "kda_ops"
    other.load_checkpoint(layer.state_dict())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(layer.named_parameters())[name])


def test_one_layer_of_a_model() -> None:
    """A prefix selects the layer; other names are ignored."""
    first, second = fla(), fla()
    model = {"lm_head.weight": torch.randn(3, 3)}
    for i, source in enumerate((first, second)):
        model |= {f"model.layers.{i}.self_attn.{n}": x for n, x in moonshot(source).items()}
    layer = make_layer()
    layer.load_checkpoint(model, prefix="model.layers.1.self_attn.")
    check(layer, second)


@pytest.mark.parametrize("naming", [dict, moonshot, hugging_face])
def test_full_rank_output_gate_and_biases(naming: Any) -> None:
    """Kimi K3's output gate is one matrix."""
    source = fla()
    del source["g_proj.0.weight"], source["g_proj.1.weight"]
    source["g_proj.weight"] = torch.randn(HV * V, HIDDEN)
    source["g_proj.bias"] = torch.randn(HV * V)
    layer = make_layer(output_gate_rank=None, output_gate_bias=True)
    layer.load_checkpoint(naming(source))
    check(layer, source)
    assert "g" not in layer.in_sizes

    del source["g_proj.bias"]
    layer = make_layer(output_gate_rank=None)
    layer.load_checkpoint(naming(source))
    check(layer, source)
    assert layer.g_proj is None


@pytest.mark.parametrize("naming", [dict, moonshot, hugging_face])
def test_full_rank_forget_gate(naming: Any) -> None:
    source = fla()
    del source["f_proj.0.weight"], source["f_proj.1.weight"]
    source["f_proj.weight"] = torch.randn(HV * K, HIDDEN)
    layer = make_layer(forget_gate_rank=None)
    layer.load_checkpoint(naming(source))
    check(layer, source)


def test_bias_of_the_convolution_and_of_the_gate() -> None:
    source = fla()
    biases = {f"{x}_conv1d.bias": torch.randn(n) for x, n in zip("qkv", (16, 16, 48), strict=True)}
    source |= biases | {"g_proj.1.bias": torch.randn(HV * V)}
    layer = make_layer(conv_bias=True, output_gate_bias=True)
    layer.load_checkpoint(source)
    check(layer, source)
    assert torch.equal(layer.conv_bias, torch.cat(list(biases.values())))
    packed = {n: x for n, x in hugging_face(source).items() if "_conv1d" not in n}
    packed["conv1d.bias"] = torch.cat(list(biases.values()))
    other = make_layer(conv_bias=True, output_gate_bias=True)
    other.load_checkpoint(packed)
    assert torch.equal(other.conv_bias, layer.conv_bias)


def test_shapes_of_both_forms() -> None:
    """Rates per head or flat, convolutions with or without the middle axis."""
    source, layer = fla(), make_layer()
    shaped = dict(source)
    shaped["A_log"] = source["A_log"].view(1, 1, HV, 1)
    shaped["dt_bias"] = source["dt_bias"].view(HV, K)
    for x in "qkv":
        shaped[f"{x}_conv1d.weight"] = source[f"{x}_conv1d.weight"][:, 0]
    layer.load_checkpoint(shaped)
    check(layer, source)


def test_16_bit_checkpoints_keep_exact_rates() -> None:
    """Weights in bf16 with rates in fp32, as checkpoints have them, into a bf16 layer."""
    source, layer = fla(), make_layer().to(torch.bfloat16)
    mixed = {n: x if n in ("A_log", "dt_bias") else x.bfloat16() for n, x in source.items()}
    layer.load_checkpoint(mixed)
    check(layer, mixed)
    assert torch.equal(layer.A_log, source["A_log"])


def test_converting_copies() -> None:
    source, layer = fla(), make_layer()
    converted = convert_state_dict(source, layer)
    for x in converted.values():
        x.zero_()
    assert all(x.any() for x in source.values())


def test_everything_wrong_is_named_at_once() -> None:
    source = moonshot(fla())
    del source["f_b_proj.weight"], source["k_conv1d.weight"]
    source["k_proj.weight"] = torch.randn(3, HIDDEN)
    source["A_log"] = torch.randn(HV + 1)
    source["rotary.inv_freq"] = torch.randn(4)
    with pytest.raises(ValueError, match=re.escape("state_dict (Moonshot naming)")) as error:
        make_layer().load_checkpoint(source)
    for part in (
        "missing f_b_proj.weight",
        "missing k_conv1d.weight",
        "unexpected rotary.inv_freq",
        "k_proj.weight must have shape [16, 20], got (3, 20)",
        "A_log must have shape [4] or [1, 1, 4, 1], got (5,)",
    ):
        assert part in str(error.value)


def test_a_failed_load_changes_nothing() -> None:
    layer, source = make_layer(), fla()
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    del source["o_proj.weight"]
    with pytest.raises(ValueError, match=re.escape("missing o_proj.weight")):
        layer.load_checkpoint(source)
    for name, x in layer.state_dict().items():
        assert torch.equal(x, before[name])


def test_a_bias_on_one_side_only() -> None:
    """Moonshot has no bias on the output gate; a layer that wants one says which is missing."""
    with pytest.raises(ValueError, match=re.escape("missing g_b_proj.bias")):
        make_layer(output_gate_bias=True).load_checkpoint(moonshot(fla()))
    with pytest.raises(ValueError, match=re.escape("unexpected g_proj.1.bias")):
        make_layer().load_checkpoint({**fla(), "g_proj.1.bias": torch.randn(HV * V)})


def test_errors_carry_the_prefix() -> None:
    source = {f"attn.{n}": x for n, x in hugging_face(fla()).items() if "dt_bias" not in n}
    with pytest.raises(ValueError, match=re.escape("missing attn.forget_gate.dt_bias")):
        make_layer().load_checkpoint(source, prefix="attn.")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ({}, "an empty one"),
        ({"a.q_proj.weight": 0}, "a.q_proj.weight"),
        (dict.fromkeys("abcd", 0), "a, b, c, ..."),
    ],
)
def test_nothing_under_the_prefix(names: dict[str, Any], shown: str) -> None:
    message = f"state_dict must have names that start with 'layers.0.', got {shown}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_layer().load_checkpoint(names, prefix="layers.0.")
