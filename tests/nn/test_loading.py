"""`load_kimi_linear`: checkpoints on disk, in one file or several, into layers or ranks' shares."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kda_ops import KimiDeltaAttention, load_kimi_linear
from kda_ops.nn import state_dict_by_parts
from kda_ops.nn.shards import Shards
from tests.nn.test_checkpoints import check, fla, hugging_face, make_layer, moonshot

HIDDEN = 32
FORMS: dict[str, dict[str, Any]] = {
    "low-rank gates": {"num_heads": 4},
    "value heads of a group": {"num_heads": 4, "num_v_heads": 8, "conv_bias": True},
    "fewer key heads than ranks": {"num_heads": 2, "num_v_heads": 4, "expand_v": 2.0},
    "full-rank gates": {
        "num_heads": 4, "forget_gate_rank": None, "output_gate_rank": None, "lower_bound": -5.0,
    },
    "no bias, no convolution": {
        "num_heads": 4, "output_gate_rank": None, "output_gate_bias": False,
        "use_short_conv": False,
    },
}  # fmt: skip


def model_of(count: int = 2, **options: Any) -> nn.ModuleDict:
    """A model of which every other module is a KDA layer."""
    blocks = [x for _ in range(count) for x in (make_layer(**options), nn.Linear(3, 3))]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def kda_layers(model: nn.Module) -> list[KimiDeltaAttention]:
    return [x for x in model.modules() if isinstance(x, KimiDeltaAttention)]


def named(sources: list[dict[str, Tensor]], prefix: str = "layers.{}.") -> dict[str, Tensor]:
    """A checkpoint of several layers and something else."""
    tensors = {
        prefix.format(2 * i) + name: x
        for i, source in enumerate(sources)
        for name, x in source.items()
    }
    return {**tensors, "lm_head.weight": torch.randn(3, 3)}


def save_sharded(tensors: dict[str, Tensor], folder: Path, index: bool = True) -> None:
    """In two files, of which each has a part of every layer. Where an index decides, the second has
    something else under a name of the first.
    """
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        stale = {names[0]: torch.zeros(1)} if index and file == "b.safetensors" else {}
        save_file({name: tensors[name] for name in held} | stale, folder / file)
    if index:
        where = {name: file for file, held in files.items() for name in held}
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("naming", [dict, moonshot, hugging_face])
@pytest.mark.parametrize("index", [True, False])
def test_layers_that_lie_in_two_files(naming: Any, index: bool, tmp_path: Path) -> None:
    sources = [fla(), fla()]
    save_sharded(named([naming(source) for source in sources]), tmp_path, index)
    model = model_of()
    before = model["layers"][1].weight.clone()
    assert load_kimi_linear(tmp_path, model) is model
    for layer, source in zip(kda_layers(model), sources, strict=True):
        check(layer, source)
    assert torch.equal(model["layers"][1].weight, before)


def test_own_names(tmp_path: Path) -> None:
    """Packed, and by parts; one layer whose path is empty."""
    layer = make_layer(conv_bias=True)
    for name, tensors in {"whole": layer.state_dict(), "parts": state_dict_by_parts(layer)}.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({name: x.clone() for name, x in tensors.items()}, file)
        other = make_layer(conv_bias=True)
        load_kimi_linear(str(file), other)
        for own, p in other.named_parameters():
            if own == "in_proj.weight":
                for part, rows in other.in_parts().items():
                    assert torch.equal(rows, layer.in_parts()[part]), part
            else:
                assert torch.equal(p, layer.get_parameter(own)), own


def test_shapes_of_both_forms(tmp_path: Path) -> None:
    """Rates per head, convolutions without the middle axis; 16 bits into fp32."""
    source = {
        name: x if name in ("A_log", "dt_bias") else x.bfloat16() for name, x in fla().items()
    }
    shaped = {
        **source,
        "dt_bias": source["dt_bias"].view(4, 8),
        **{f"{x}_conv1d.weight": source[f"{x}_conv1d.weight"][:, 0] for x in "qkv"},
    }
    save_file(shaped, tmp_path / "model.safetensors")
    layer = make_layer()
    load_kimi_linear(tmp_path, layer)
    check(layer, {name: x.float() for name, x in source.items()})


# ---------------------------------------------------------------------- ranks


def share_of(form: str, ranks: int) -> KimiDeltaAttention:
    """A layer with the heads of one rank."""
    options = dict(FORMS[form])
    H, HV = options.pop("num_heads"), options.pop("num_v_heads", None)
    HV = (HV or H) // ranks
    return KimiDeltaAttention(HIDDEN, 8, max(H // ranks, 1), num_v_heads=HV, **options).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_ranks_read_their_heads(
    form: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs of all ranks add up to the whole layer's, and nothing else is read."""
    whole = KimiDeltaAttention(HIDDEN, 8, **FORMS[form]).double().requires_grad_(False)
    tensors = whole.state_dict() if packed else state_dict_by_parts(whole)
    save_file({name: x.clone() for name, x in tensors.items()}, tmp_path / "model.safetensors")
    counts: list[int] = []
    read = Shards.read

    def counting(*args: Any) -> Tensor:
        counts.append((found := read(*args)).numel())
        return found

    monkeypatch.setattr(Shards, "read", counting)
    x = torch.randn(1, 70, HIDDEN, dtype=torch.float64)
    for ranks in (2, 4):
        total = torch.zeros_like(x)
        for rank in range(ranks):
            share = share_of(form, ranks).requires_grad_(False)
            counts.clear()
            load_kimi_linear(tmp_path, share, tp_rank=rank, tp_size=ranks)
            pad = share.in_sizes["pad"] * HIDDEN
            assert sum(counts) == sum(p.numel() for p in share.parameters()) - pad
            total += share(x)
        torch.testing.assert_close(total, whole(x), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- which layer is which


def test_other_names_are_taken_in_order(tmp_path: Path) -> None:
    """By the numbers in their names: 10 comes after 2."""
    sources = [fla() for _ in range(6)]
    save_file(named(sources, "model.layers.{}.self_attn."), tmp_path / "x.safetensors")
    model = model_of(6)
    load_kimi_linear(tmp_path, model)
    for layer, source in zip(kda_layers(model), sources, strict=True):
        check(layer, source)


def test_prefixes_say_which(tmp_path: Path) -> None:
    sources = [fla() for _ in range(3)]
    save_file(named(sources, "model.layers.{}.attn."), tmp_path / "x.safetensors")
    model = model_of(2)
    prefixes = {"layers.0": "model.layers.4.attn.", "layers.2": "model.layers.0.attn."}
    load_kimi_linear(tmp_path, model, prefixes=prefixes)
    first, second = kda_layers(model)
    check(first, sources[2])
    check(second, sources[0])
    with pytest.raises(ValueError, match=r"prefixes must have paths of KDA layers, .*got layers.1"):
        load_kimi_linear(tmp_path, model, prefixes={"layers.1": "x."})
    with pytest.raises(ValueError, match=r"model.layers.4.attn. there and layers.0, layers.2 here"):
        load_kimi_linear(tmp_path, model)


# ---------------------------------------------------------------------- errors


def test_everything_wrong_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = named([moonshot(fla()), fla(), fla()])
    del tensors["layers.0.f_b_proj.weight"]
    tensors["layers.0.k_proj.weight"] = torch.randn(3, 20)
    tensors["layers.2.g_proj.1.bias"] = torch.randn(48)
    save_sharded(tensors, tmp_path)
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^the checkpoint does not fit the model: ") as error:
        load_kimi_linear(tmp_path, model)
    assert str(error.value).partition(": ")[2].split("; ") == [
        "unexpected layer layers.4.*",
        "missing layers.0.f_b_proj.weight",
        "layers.0.k_proj.weight must have shape [16, 20], got (3, 20)",
        "unexpected layers.2.g_proj.1.bias",
    ]
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_files_that_are_wrong(tmp_path: Path) -> None:
    def fails(text: str, path: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=re.escape(text)):
            load_kimi_linear(path, layer)

    layer = make_layer()
    fails("path must have safetensors files, got")
    fails("path must be a file or a directory that is there", tmp_path / "nowhere")
    tensors = fla()
    save_sharded(tensors, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["more"] = "b.safetensors"
    index.write_text(json.dumps(text))
    fails("missing more in b.safetensors, where the index says it is")
    index.write_text("{}")
    fails("must be an index with a weight_map: KeyError('weight_map')")
    index.unlink()
    save_sharded(tensors, tmp_path, index=False)
    save_file({"A_log": tensors["A_log"]}, tmp_path / "c.safetensors")
    fails("A_log is in a.safetensors and in c.safetensors")
    (tmp_path / "c.safetensors").unlink()
    damaged = (tmp_path / "b.safetensors").read_bytes()[:-8]
    (tmp_path / "b.safetensors").write_bytes(damaged)
    fails("b.safetensors cannot be read as safetensors")
    (tmp_path / "b.safetensors").unlink()
    index.write_text(json.dumps(text))
    fails("names files that are missing: b.safetensors")


def test_models_that_are_wrong(tmp_path: Path) -> None:
    save_file(fla(), tmp_path / "model.safetensors")

    def fails(model: nn.Module | None, text: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(text)):
            load_kimi_linear(tmp_path, model, **options)

    layer = make_layer()
    fails(layer, "tp_rank must be in [0, 2), got 2", tp_rank=2, tp_size=2)
    fails(layer, "tp_size must be at least 1, got 0", tp_size=0)
    fails(layer, "b_proj.weight must have shape [8, 20], got (4, 20)", tp_size=2)
    fails(nn.Linear(2, 2), "be a model of transformers, got Linear")
    fails(None, "tp_size and prefixes are for KimiDeltaAttention layers", tp_size=2)
    fails(make_layer(device="meta"), "model must have memory")


def test_safetensors_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="checkpoints are read by safetensors: pip install it"):
        load_kimi_linear(tmp_path, make_layer())


def test_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(fla(), tmp_path / "model.safetensors")
    layer = make_layer()
    load_kimi_linear(tmp_path, layer)
    assert capsys.readouterr() == ("", "")
    load_kimi_linear(tmp_path, layer, progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"(\d+)/\1   o_proj.weight", last)
