"""Checkpoints of other KDA layers, renamed and packed into the parameters of `KimiDeltaAttention`.

Four naming schemes are recognized by their names:

* FLA: `f_proj.0`, `f_proj.1`, `A_log [HV]`, `dt_bias`, `g_proj.0`, `g_proj.1`, `q_conv1d`,
  `k_conv1d`, `v_conv1d`;
* Moonshot: `f_a_proj`, `f_b_proj`, `A_log [1, 1, HV, 1]`, `dt_bias`, `g_a_proj`, `g_b_proj`,
  `q_conv1d`, `k_conv1d`, `v_conv1d`;
* Hugging Face: `forget_gate.f_a_proj`, `forget_gate.f_b_proj`, `forget_gate.A_log`,
  `forget_gate.dt_bias`, `g_a_proj`, `g_b_proj`, one `conv1d`;
* kda_ops: the layer's own, `in_proj`, `conv_weight`, ..., packed or by parts (`kda_ops.nn.parts`).

A full-rank gate is a single `f_proj` or `g_proj` in all but the last. The last has one matrix,
`in_proj`, where the others have one each for q, k, v, the gates and beta.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kda_ops.nn.parts import join_parts

if TYPE_CHECKING:
    from kda_ops.nn.layer import KimiDeltaAttention


def detect_naming(names: Iterable[str]) -> str:
    """A layer's naming: `"kda_ops"`, `"Hugging Face"`, `"Moonshot"` or `"FLA"`."""
    firsts = {name.split(".")[0] for name in names}
    if "in_proj" in firsts:
        return "kda_ops"
    if firsts & {"forget_gate", "conv1d"}:
        return "Hugging Face"
    if firsts & {"f_a_proj", "g_a_proj"}:
        return "Moonshot"
    return "FLA"


def convert_state_dict(
    state_dict: Mapping[str, Tensor], layer: "KimiDeltaAttention", prefix: str = ""
) -> dict[str, Tensor]:
    """A state dict of one KDA layer, with the names and shapes of `layer.load_state_dict`.

    Args:
        state_dict: Tensors by name, in any naming scheme of this module. May contain other layers
            if `prefix` is given.
        layer: The layer to load into; its sizes determine what is expected. Moonshot's and Hugging
            Face's layers have no bias on the output gate: make the layer with
            `output_gate_bias=False` for them.
        prefix: The prefix of this layer's names, such as `"model.layers.0.self_attn."`.

    Returns:
        Tensors by the layer's own names, with the checkpoint's dtypes and devices.

    Raises:
        ValueError: Lists everything that is missing, unexpected or of the wrong shape, by the
            checkpoint's names.
    """
    found = {
        name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f"state_dict must have names that start with {prefix!r}, got {_some(state_dict)}"
        )
    join_parts(layer, found)
    naming = detect_naming(found)
    parts = {
        name: sources_of(name, shape, layer, naming)
        for name, shape in layer.parameter_shapes.items()
    }
    shapes = {source: allowed for sources in parts.values() for source, allowed in sources.items()}
    problems = mismatches({name: tuple(x.shape) for name, x in found.items()}, shapes, prefix)
    if problems:
        raise ValueError(
            f"state_dict ({naming} naming) does not fit the layer: " + "; ".join(problems)
        )
    # the first allowed shape is the layer's
    converted = {
        name: torch.cat([found[source].reshape(allowed[0]) for source, allowed in sources.items()])
        for name, sources in parts.items()
    }
    if naming != "kda_ops":
        converted["in_proj.weight"] = layer.in_padded(converted["in_proj.weight"])
    return converted


def mismatches(
    found: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, list[tuple[int, ...]]],
    prefix: str = "",
) -> list[str]:
    """What is missing, unexpected or of the wrong shape.

    Args:
        found: The shapes that are there, by name.
        shapes: The shapes that are allowed, by name.
        prefix: What goes before the names.
    """
    problems = [f"missing {prefix}{name}" for name in shapes if name not in found]
    problems += [f"unexpected {prefix}{name}" for name in found if name not in shapes]
    for name, allowed in shapes.items():
        if name in found and found[name] not in allowed:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            problems.append(f"{prefix}{name} must have shape {expected}, got {found[name]}")
    return problems


def sources_of(
    name: str, shape: tuple[int, ...], layer: "KimiDeltaAttention", naming: str
) -> dict[str, list[tuple[int, ...]]]:
    """The sources of one parameter: the checkpoint's names, in order, with allowed shapes."""
    if naming == "kda_ops":
        return {name: [shape]}
    rows = {x: layer.in_sizes[x] for x in "qkv"}
    if name == "in_proj.weight":
        seconds = {"f": layer.f_proj, "g": layer.g_proj}
        firsts = {x: ".0" for x, second in seconds.items() if second is not None}
        return {
            _elsewhere(f"{x}_proj{firsts.get(x, '')}.weight", naming): [(n, *shape[1:])]
            for x, n in layer.in_sizes.items()
            if x != "pad"
        }
    if name in ("conv_weight", "conv_bias"):
        part = name.removeprefix("conv_")
        names = (
            {"conv1d": shape[0]}
            if naming == "Hugging Face"
            else {f"{x}_conv1d": n for x, n in rows.items()}
        )
        return {
            f"{source}.{part}": [(n, *shape[1:])]
            + ([(n, 1, *shape[1:])] if part == "weight" else [])
            for source, n in names.items()
        }
    HV, K = layer.num_v_heads, layer.head_k_dim
    allowed = {"A_log": [shape, (1, 1, HV, 1)], "dt_bias": [shape, (HV, K)]}.get(name, [shape])
    if name == "o_norm_weight":
        name = "o_norm.weight"
    if name.startswith("f_proj") or (name.startswith("g_proj") and "g" in layer.in_sizes):
        name = name.replace("_proj.", "_proj.1.")
    return {_elsewhere(name, naming): allowed}


def _elsewhere(name: str, naming: str) -> str:
    """Translates FLA's name of a parameter to another naming scheme."""
    if naming != "FLA":
        name = re.sub(r"^([fg])_proj\.([01])\.", lambda m: f"{m[1]}_{'ab'[int(m[2])]}_proj.", name)
    if naming == "Hugging Face" and name.startswith(("f_", "A_log", "dt_bias")):
        name = f"forget_gate.{name}"
    return name


def _some(names: Mapping[str, Tensor]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "") if shown else "an empty one"
