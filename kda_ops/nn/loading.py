"""KDA layers filled from a checkpoint on disk: which rows of which tensor go where.

A plan is made for all layers from names and shapes alone, and checked as a whole; then each tensor
is read and copied, of a layer that is one rank's share only the rows and columns of its heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kda_ops.cache.spec import units_held
from kda_ops.nn.checkpoints import detect_naming, mismatches, sources_of
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.nn.parts import PACKED, part_sizes, split_weight
from kda_ops.nn.shards import Shards

KEY_HEADS = frozenset("qk")
VALUE_HEADS = frozenset(
    {"v", "b", "f_proj.weight", "g_proj.weight", "g_proj.bias", "A_log", "dt_bias", "o_proj.weight"}
)


class Piece(NamedTuple):
    """A range of one tensor of a checkpoint, and where it goes.

    Attributes:
        source: Name of the tensor.
        shape: Its shape as the whole layer has it.
        axis: Axis of the range.
        start: First row or column.
        stop: Behind the last one.
        target: A view of a parameter's own memory.
    """

    source: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int
    target: Tensor


class Share(NamedTuple):
    """The heads of one rank.

    Attributes:
        rank: In `[0, ranks)`.
        ranks: Ranks in all.
        all_key_heads: Whether it keeps all key heads, where there are fewer than ranks.
    """

    rank: int
    ranks: int
    all_key_heads: bool = False

    def held(self, part: str, size: int, whole: KimiDeltaAttention) -> range:
        """The rows (columns of `o_proj`) of a part of the whole layer's."""
        if part in KEY_HEADS and not (self.all_key_heads and whole.num_heads < self.ranks):
            heads = whole.num_heads
        elif part in VALUE_HEADS or (part in ("f", "g") and getattr(whole, f"{part}_proj") is None):
            heads = whole.num_v_heads
        else:
            return range(size)
        units, width = units_held(heads, self.ranks, self.rank), size // heads
        return range(units.start * width, units.stop * width)


def layers_of(model: nn.Module) -> dict[str, KimiDeltaAttention]:
    """The KDA layers of a model by their paths."""
    return {path: x for path, x in model.named_modules() if isinstance(x, KimiDeltaAttention)}


def plan(
    shards: Shards,
    layers: Mapping[str, KimiDeltaAttention],
    prefixes: Mapping[str, str] | None,
    tp_rank: int,
    tp_size: int,
) -> list[Piece]:
    """What goes where, for all layers.

    Raises:
        ValueError: Everything that does not fit; see `load_kimi_linear`.
    """
    for path, layer in layers.items():
        check_memory(path, layer, tp_size)
    pieces: list[Piece] = []
    problems: list[str] = []
    for path, prefix in matched(shards, layers, prefixes, problems).items():
        found = {
            name.removeprefix(prefix): shape
            for name, shape in shards.shapes.items()
            if name.startswith(prefix)
        }
        planned, wrong = plan_layer(layers[path], found, prefix, tp_rank, tp_size)
        pieces += planned
        problems += wrong
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    return pieces


@torch.no_grad()
def fill(
    shards: Shards,
    layers: Iterable[KimiDeltaAttention],
    pieces: list[Piece],
    update: Callable[[int, str], None],
) -> None:
    """Reads and copies all pieces; `update` is told how many, and which, after each."""
    for layer in layers:
        pad = layer.in_sizes["pad"]
        if pad and isinstance(layer.in_proj, nn.Linear):  # a parallel layer keeps its own at zero
            layer.in_proj.weight[-pad:].zero_()
    for done, piece in enumerate(pieces, 1):
        x = shards.read(*piece[:5])
        piece.target.copy_(x.reshape(piece.target.shape))
        update(done, piece.source)


def check_memory(path: str, layer: Any, tp_size: int) -> None:
    """Whether the parameters of a layer can be written as they are."""
    name, mesh = path or "model", getattr(layer, "mesh", None)
    if mesh is not None and tp_size != 1:
        raise ValueError(f"tp_size must be 1 as {name} is parallel already, got {tp_size}")
    for p in layer.parameters():
        if p.is_meta:
            raise ValueError(
                f"{name} must have memory, got parameters on the device meta: call "
                f"model.to_empty(device=...) before"
            )
        if getattr(p, "device_mesh", mesh) != mesh:
            raise ValueError(f"{name} must be loaded before fully_shard, got sharded parameters")


# ---------------------------------------------------------------------- names


def matched(
    shards: Shards,
    layers: Mapping[str, KimiDeltaAttention],
    prefixes: Mapping[str, str] | None,
    problems: list[str],
) -> dict[str, str]:
    """The prefix of each layer's names in the checkpoint; adds to `problems` what is left over."""
    there = kda_prefixes(shards.shapes)
    own = {path: f"{path}." if path else "" for path in layers}
    if prefixes is not None:
        if unknown := sorted(set(prefixes) - set(layers)):
            raise ValueError(
                f"prefixes must have paths of KDA layers, {_listed(layers)}, got {_listed(unknown)}"
            )
        return {path: prefixes.get(path, prefix) for path, prefix in own.items()}

    def is_there(prefix: str) -> bool:
        if not prefix:
            return "" in there or "o_proj.weight" in shards.shapes
        return any(name.startswith(prefix) for name in shards.shapes)

    if all(is_there(prefix) for prefix in own.values()):
        problems += [f"unexpected layer {x}*" for x in there if x not in own.values()]
        return own
    if len(there) == len(layers):
        return dict(zip(layers, there, strict=True))
    raise ValueError(
        f"the checkpoint must have as many KDA layers as the model, or the same names: got "
        f"{_listed(there)} there and {_listed(layers)} here; say which with prefixes"
    )


def kda_prefixes(names: Iterable[str]) -> list[str]:
    """What precedes the names of each KDA layer, in the order of their numbers."""
    found = {
        match[1] for name in names if (match := re.fullmatch(r"(.*?)(?:forget_gate\.)?A_log", name))
    }

    def numbers(prefix: str) -> list[tuple[int, str]]:
        return [(int(x), "") if x.isdecimal() else (-1, x) for x in prefix.split(".")]

    return sorted(found, key=numbers)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "(the module itself)" for name in names) or "none"


# ---------------------------------------------------------------------- one layer


def plan_layer(
    layer: KimiDeltaAttention,
    found: Mapping[str, tuple[int, ...]],
    prefix: str,
    tp_rank: int,
    tp_size: int,
) -> tuple[list[Piece], list[str]]:
    """The pieces of one layer, or what does not fit."""
    mesh: Any = getattr(layer, "mesh", None)
    if mesh is not None:
        share = Share(mesh.get_local_rank(), mesh.size(), all_key_heads=True)
        return plan_share(layer, layer, found, prefix, share)
    share = Share(tp_rank, tp_size)
    if tp_size == 1:
        return plan_share(layer, layer, found, prefix, share)
    results = [
        plan_share(layer, whole, found, prefix, share) for whole in whole_layers(layer, tp_size)
    ]
    return min(results, key=lambda result: len(result[1]))


def whole_layers(layer: KimiDeltaAttention, tp_size: int) -> list[KimiDeltaAttention]:
    """The layers, without memory, of which this may be one rank's share: a single key head may be
    one of any number that divides the ranks.
    """
    H, HV = layer.num_heads * tp_size, layer.num_v_heads * tp_size
    heads = [H, *(n for n in range(1, tp_size) if tp_size == H and tp_size % n == 0)]
    f, g = layer.f_proj, layer.g_proj
    return [
        KimiDeltaAttention(
            layer.hidden_size,
            layer.head_k_dim,
            n,
            num_v_heads=HV,
            expand_v=layer.head_v_dim / layer.head_k_dim,
            use_short_conv=layer.use_short_conv,
            conv_size=layer.conv_size,
            conv_bias=layer.conv_bias is not None,
            forget_gate_rank=None if f is None else layer.in_sizes["f"],
            output_gate_rank=None if g is None else layer.in_sizes.get("g"),
            output_gate_bias=g is not None and g.bias is not None,
            device="meta",
        )
        for n in heads
    ]


def plan_share(
    layer: KimiDeltaAttention,
    whole: KimiDeltaAttention,
    found: Mapping[str, tuple[int, ...]],
    prefix: str,
    share: Share,
) -> tuple[list[Piece], list[str]]:
    """The pieces of a layer that has a share of the heads of a whole one, or what does not fit."""
    naming = detect_naming(found)
    targets = memory_of(layer)
    pieces: list[Piece] = []
    allowed: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in whole.parameter_shapes.items():
        axis = 1 if name == "o_proj.weight" else 0
        parts = {name: shape[axis]}
        if name in PACKED:
            parts = {x: n for x, n in part_sizes(whole, name).items() if x != "pad"}
        sources = sources_of(name, shape, whole, naming)
        if name in PACKED and naming == "kda_ops" and name not in found:  # saved by parts
            sources = {f"{PACKED[name]}.{x}": [(n, *shape[1:])] for x, n in parts.items()}
        allowed |= sources
        names, first = list(sources), 0
        for i, (part, size) in enumerate(parts.items()):
            source = names[i if len(names) > 1 else 0]
            held = share.held(part, size, whole)
            target = targets[f"{PACKED[name]}.{part}" if name in PACKED else name]
            start, stop = first + held.start, first + held.stop
            pieces.append(Piece(prefix + source, sources[source][0], axis, start, stop, target))
            first += size if len(names) == 1 else 0  # else each part is a tensor of its own
    return pieces, mismatches(found, allowed, prefix)


def memory_of(layer: KimiDeltaAttention) -> dict[str, Tensor]:
    """The memory of a layer's parameters on this rank, that of packed ones by part."""
    memory: dict[str, Tensor] = {}
    for name, p in layer.named_parameters():
        local = p.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        memory |= split_weight(layer, name, local) if name in PACKED else {name: local}
    return memory
