"""The layer over the ranks of a mesh: tensor parallelism by heads.

    parallelize(model, mesh["tp"])  # in place: every `KimiDeltaAttention` in the model

Each rank computes `HV / ranks` value heads and the key heads that they need, and the outputs are
summed: one collective per layer, an all-reduce, or with `sequence_parallel` an all-gather before
the layer and a reduce-scatter after it. A backward has the same for the input, and a small
all-reduce for each parameter that all ranks have. States are those of `state_spec()`, of one rank's
heads.

**Parameters.** Every parameter becomes a DTensor whose values over all ranks, in order, are those
of the whole layer: a plain `Shard` by heads, or `Replicate` for what all heads share (the first
factor of a low-rank gate, the weight of the output norm) and for q and k if there are fewer key
heads than ranks. The packed weights, `in_proj.weight`, `conv_weight` and `conv_bias`, are q | k | v
| ... one after another, of which no `Shard` gives a rank its heads of each; so a parallel layer has
their parts as parameters, `in_proj.q`, `conv_weight.k`, .... The alternatives are worse:

* rows reordered by rank, with hooks that restore the order: a state dict would be right, but an
  optimizer's state, which no hook sees, would belong to other rows on another number of ranks;
* strided shards: only for parts of equal size;
* one local tensor of several shards (`LocalShardsWrapper`): DCP reads and writes it, but neither
  `full_tensor`, nor optimizers, nor gradient clipping, nor FSDP2 take it. And what is on several
  ranks would count several times in a gradient's norm.

So everything that works on DTensors works, and checkpoints do not depend on the number of ranks.
The input projections still are one GEMM: the parts of a rank are views of one packed tensor, which
is what a call under `torch.no_grad()` multiplies by. A call with gradients concatenates them. So
do, also without gradients, layers that FSDP2 shards (which gathers parts to memory of its own), and
layers with fewer key heads than ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from kda_ops.cache.spec import units_held
from kda_ops.nn.context import ContextParallel, check_mesh
from kda_ops.nn.headwise import ParallelKimiDeltaAttention, shard_layer
from kda_ops.nn.layer import KimiDeltaAttention

__all__ = ["HeadwiseParallel", "parallelize"]


class HeadwiseParallel(ParallelStyle):
    """Shards a KDA layer by heads, in `torch.distributed.tensor.parallel.parallelize_module`.

    For a `KimiDeltaAttention`, or a module that contains some.

    Args:
        input_layouts: How a layer's input, a plain tensor, is spread over the ranks:
            `Replicate()`, or `Shard(1)` for tokens. An input that is a DTensor says so itself.
        output_layouts: How its output is to be, likewise.
        use_local_output: Whether the output is a plain tensor instead of a DTensor.

    Raises:
        ValueError: A layout that is neither.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output
        for name in ("input_layouts", "output_layouts"):
            if getattr(self, name) not in (Replicate(), Shard(1)):
                raise ValueError(
                    f"{name} must be Replicate() or Shard(1), got {getattr(self, name)}"
                )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_mesh("mesh", device_mesh)
        layers, problem = layers_with_problem(module, device_mesh)
        agree(layers, problem, device_mesh, self)
        for _, layer in layers:
            shard_layer(layer, device_mesh, self)
        return module

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    cp: ContextParallel | None = None,
    sequence_parallel: bool = False,
    use_local_output: bool = True,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Shards every `KimiDeltaAttention` of a module by heads, by tokens, or both, in place. A
    collective of the meshes.

    Before `fully_shard` (over another dimension of the mesh, or over that of `cp`) and before
    `torch.compile`; an optimizer is made afterwards, as parameters are replaced.

    Args:
        module: A layer, or a model with layers. On the device "meta" only the shapes are sharded.
        mesh: One dimension, the tensor-parallel ranks; `mesh["tp"]` of a larger one. Its size
            divides the value heads, and divides the key heads or is a multiple of them. None leaves
            heads and parameters as they are.
        cp: The ranks that share the tokens of a sequence. A layer's input and output are then this
            rank's tokens, `cu_seqlens` still counts those of all ranks, and there are no states.
            Parameters, which have to be equal on all ranks of it, get the gradients of this
            rank's tokens, to be reduced as in data parallelism.
        sequence_parallel: Whether input and output of a layer are shards of the tokens, `[B, T /
            ranks, hidden_size]`, instead of the same on every rank of `mesh`.
        use_local_output: Whether outputs are plain tensors instead of DTensors (of `mesh`).
        src_data_rank: The rank of the mesh whose weights are taken; None if they are equal
            everywhere already, which saves the communication.

    Returns:
        The same module.

    Raises:
        ValueError: The heads of a layer do not divide, there is no layer, one is a subclass with a
            forward of its own or parallel already, or the ranks disagree. Raised on all ranks of
            the meshes; nothing is sharded then.
        RuntimeError: A rank does not answer within the timeout of the process group.
    """
    if mesh is None and cp is None:
        raise ValueError("mesh or cp must be given, got neither")
    tokens = Shard(1) if sequence_parallel else Replicate()
    style = HeadwiseParallel(
        input_layouts=tokens, output_layouts=tokens, use_local_output=use_local_output
    )
    style.src_data_rank = src_data_rank
    if cp is not None and not isinstance(cp, ContextParallel):
        raise ValueError(f"cp must be a ContextParallel, got {type(cp).__name__}")
    if mesh is not None:
        check_mesh("mesh", mesh)
    layers, problem = layers_with_problem(module, mesh)
    agree(layers, problem, mesh, style, cp)
    for _, layer in layers:
        if mesh is not None:
            shard_layer(layer, mesh, style)
        if cp is not None:
            layer.context = cp
    return module


# ---------------------------------------------------------------------- checks


def layers_with_problem(
    module: nn.Module, mesh: DeviceMesh | None
) -> tuple[list[tuple[str, KimiDeltaAttention]], ValueError | None]:
    """The layers of a module, and why they cannot be sharded; over no mesh, by tokens alone."""
    layers = [(name, x) for name, x in module.named_modules() if isinstance(x, KimiDeltaAttention)]
    try:
        if not layers:
            raise ValueError(
                f"module must have a KimiDeltaAttention, got {type(module).__name__} without any"
            )
        for name, layer in layers:
            check_layer(name or "module", layer)
            if mesh is not None:
                check_heads(name or "module", layer, mesh)
    except ValueError as error:
        return layers, error
    return layers, None


def check_layer(name: str, layer: KimiDeltaAttention) -> None:
    """Whether a layer can be sharded at all."""
    if layer.context is not None:
        raise ValueError(f"{name} must not be parallel already")
    ours = (KimiDeltaAttention.forward, ParallelKimiDeltaAttention.forward)
    if type(layer).forward not in ours:
        raise ValueError(f"{name} must have the forward of KimiDeltaAttention, got another one")


def check_heads(name: str, layer: KimiDeltaAttention, mesh: DeviceMesh) -> None:
    """Whether a layer can be sharded by heads over a mesh."""
    ranks = mesh.size()
    if isinstance(layer, ParallelKimiDeltaAttention):
        raise ValueError(f"{name} must not be parallel already")
    if any(isinstance(p, DTensor) for p in layer.parameters()):
        raise ValueError(f"{name} must have plain parameters: shard it by heads first")
    for kind, heads, least in (
        ("num_v_heads", layer.num_v_heads, ranks),
        ("num_heads", layer.num_heads, 1),
    ):
        if heads < least:
            raise ValueError(f"{name} must have {kind} of at least {ranks} ranks, got {heads}")
        try:
            units_held(heads, ranks, 0)
        except ValueError as error:
            raise ValueError(f"{name} cannot be sharded by {kind}: {error}") from error


def description(layer: KimiDeltaAttention) -> str:
    """What the ranks must agree on, since their collectives follow from it."""
    parameters = [
        f"{name} {list(p.shape)} {p.dtype} {p.device.type}{'' if p.requires_grad else ' frozen'}"
        for name, p in layer.named_parameters()
    ]
    return f"{type(layer).__name__}({layer.extra_repr()}): {', '.join(parameters)}"


def agree(
    layers: list[tuple[str, KimiDeltaAttention]],
    problem: ValueError | None,
    mesh: DeviceMesh | None,
    style: HeadwiseParallel,
    cp: ContextParallel | None = None,
) -> None:
    """Raises on all ranks of both meshes what one of them has found, or that they differ."""
    by_heads = None if mesh is None else mesh.size()
    facts = (by_heads, repr(style), repr(cp), [(name, description(x)) for name, x in layers])
    for ranks in (mesh, None if cp is None else cp.mesh):
        if ranks is not None:  # also with a problem: the other mesh's ranks wait to hear of it
            problem = disagreement(ranks, (ranks.mesh.tolist(), *facts), problem)
    if problem is not None:
        raise problem


def disagreement(mesh: DeviceMesh, facts: Any, problem: ValueError | None) -> ValueError | None:
    """What a rank of the mesh has found, or that they do not mean the same."""
    said: list[Any] = [None] * mesh.size()
    mine = (facts, None if problem is None else str(problem))
    dist.all_gather_object(said, mine, group=mesh.get_group())
    if problem is not None:
        return problem
    for rank, (other, their_problem) in enumerate(said):
        if their_problem is not None:
            return ValueError(f"rank {rank} of the mesh: {their_problem}")
        if other != facts:
            return ValueError(
                f"all ranks must shard the same layers over the same mesh, got {facts} on this "
                f"rank and {other} on rank {rank} of the mesh"
            )
    return None
