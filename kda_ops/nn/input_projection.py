"""All input projections are one GEMM: the rows of its weight, and its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kda_ops.nn.layer import KimiDeltaAttention as Layer

ROW = 64  # elements: rows that are read in parts start at aligned memory transactions


class Projected(NamedTuple):
    """The projections of the hidden states, `[B, T, ...]` each.

    Attributes:
        x: `[B, T, D]`, into the convolution.
        raw_gate: `[B, T, HV, K]`, into the forget gate.
        output_gate: `[B, T, HV, V]`, before its sigmoid.
        raw_beta: `[B, T, HV]`, before its sigmoid.
    """

    x: Tensor
    raw_gate: Tensor
    output_gate: Tensor
    raw_beta: Tensor

    def split(self, rows: tuple[int, int]) -> tuple[Projected, Projected]:
        """Splits off the first tokens."""
        first, second = zip(*(y.split(rows, dim=1) for y in self), strict=True)
        return Projected(*first), Projected(*second)


def input_sizes(
    key_dim: int,
    value_dim: int,
    gate_dim: int,
    value_heads: int,
    forget_rank: int | None,
    output_rank: int | None,
    output_gate_bias: bool,
) -> dict[str, int]:
    """Rows of the projection by part: q | k | v | f | g | b | pad.

    It includes only the first factor of a low-rank gate. A full-rank output gate with a bias is a
    separate projection.
    """
    sizes = {
        "q": key_dim,
        "k": key_dim,
        "v": value_dim,
        "f": gate_dim if forget_rank is None else forget_rank,
        "g": value_dim if output_rank is None else output_rank,
        "b": value_heads,
    }
    if output_rank is None and output_gate_bias:
        del sizes["g"]
    sizes["pad"] = -sum(sizes.values()) % ROW
    return sizes


def parts_of(weight: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The rows of a weight by their names, without `pad`: views."""
    parts = dict(zip(sizes, weight.split(list(sizes.values())), strict=True))
    del parts["pad"]
    return parts


def padded(rows: Tensor, sizes: dict[str, int]) -> Tensor:
    """A weight from the concatenated rows of its parts."""
    return F.pad(rows, (0, 0, 0, sizes["pad"]))


def project(layer: Layer, hidden_states: Tensor) -> Projected:
    """The convolution's input, both gates by head, and beta before its sigmoid."""
    sizes = layer.in_sizes
    names = [name for name in sizes if name not in "qkv"]
    widths = [layer.conv_dim, *(sizes[name] for name in names)]
    # 2-d GEMMs: on a slice with more axes `nn.Linear` would add the bias separately
    rows = hidden_states.flatten(0, 1)
    x, *rest = layer.in_proj(rows).split(widths, dim=-1)
    parts = dict(zip(names, rest, strict=True))
    f, z, beta = parts["f"], parts.get("g", rows), parts["b"]
    if layer.f_proj is not None:
        f = layer.f_proj(f)
    if layer.g_proj is not None:
        z = layer.g_proj(z)
    x, f, z, beta = (y.unflatten(0, hidden_states.shape[:2]) for y in (x, f, z, beta))
    f = f.unflatten(-1, (layer.num_v_heads, layer.head_k_dim))
    return Projected(x, f, z.unflatten(-1, (layer.num_v_heads, layer.head_v_dim)), beta)
