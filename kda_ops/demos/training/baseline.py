"""The same model with the layer of flash-linear-attention (FLA)."""

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from kda_ops._versions import version
from kda_ops.nn.layer import KimiDeltaAttention


def fla_version() -> str | None:
    """The version of FLA, or None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    found = version("fla-core") or version("flash-linear-attention")
    return found or "of unknown version"


def fla_layer(ours: KimiDeltaAttention) -> nn.Module:
    """FLA's layer with copies of the weights of ours, for the gates that are its default."""
    theirs: nn.Module = importlib.import_module("fla.layers").KimiDeltaAttention(
        hidden_size=ours.hidden_size,
        head_dim=ours.head_k_dim,
        num_heads=ours.num_heads,
        lower_bound=ours.lower_bound,
        safe_gate=ours.lower_bound is not None,
    )
    weights: dict[str, Tensor] = dict(ours.named_parameters())
    weights["o_norm.weight"] = weights.pop("o_norm_weight")
    for gate in "fg":
        for part in ("weight", "bias"):
            if f"{gate}_proj.{part}" in weights:
                weights[f"{gate}_proj.1.{part}"] = weights.pop(f"{gate}_proj.{part}")
    del weights["in_proj.weight"]
    for name, projection in ours.in_parts().items():
        weights[f"{name}_proj.0.weight" if name in "fg" else f"{name}_proj.weight"] = projection
    convolutions = weights.pop("conv_weight").split([ours.in_sizes[x] for x in "qkv"])
    for name, convolution in zip("qkv", convolutions, strict=True):
        weights[f"{name}_conv1d.weight"] = convolution
    for name, parameter in theirs.named_parameters():
        parameter.data = weights.pop(name).detach().clone().reshape(parameter.shape)
    if weights:
        raise ValueError(f"FLA's layer must have {', '.join(weights)}")
    return theirs


class FlaMixer(nn.Module):
    """FLA's layer as FLA runs it: outside of compiled graphs, which would break at each of its
    operators.
    """

    def __init__(self, ours: KimiDeltaAttention) -> None:
        super().__init__()
        self.layer = fla_layer(ours)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]
