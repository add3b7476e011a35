"""The model over several processes: tensor parallel by PyTorch's styles, data parallel by FSDP2,
context parallel by the layers.

Between the layers each tensor-parallel rank has a part of the tokens: norms and residual stream
work on them alone. Layers and MLPs gather all tokens and return their sum in parts. With context
parallelism "all" are those of a part of each sequence; nothing but the layers knows of the others.

Replicas are FSDP2 with shards of one rank. So every parameter is a DTensor over one mesh, whatever
the options, and clipping, the optimizer and checkpoints are the same for all of them.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from kda_ops.demos.training.model import ByteModel
from kda_ops.demos.training.ranks import REPLICATE, SHARD, TENSOR
from kda_ops.nn.context import ContextParallel
from kda_ops.nn.parallel import parallelize

TOKENS = Shard(1)


def block_styles() -> dict[str, ParallelStyle]:
    """The styles of a block, but for its mixer."""
    return {
        "mixer_norm": SequenceParallel(use_local_output=True),
        "mlp_norm": SequenceParallel(use_local_output=True),
        "mlp.gate_up": ColwiseParallel(input_layouts=TOKENS),
        "mlp.down": RowwiseParallel(output_layouts=TOKENS),
    }


def tensor_parallel(model: ByteModel, mesh: DeviceMesh, cp: ContextParallel | None) -> None:
    """Shards every layer over the ranks of a mesh, in place, and its tokens over those of a
    context. All ranks have the same weights.
    """
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS),
        "head.norm": SequenceParallel(use_local_output=True),
        "head.logits": ColwiseParallel(input_layouts=TOKENS, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends, src_data_rank=None)
    # waits for it: a tensor that is still awaited is of another class than what other blocks get,
    # and compiled code has no right gradient for it
    model.embedding.register_forward_hook(lambda module, args, x: x.clone())
    for block in model.blocks:
        parallelize_module(block, mesh, block_styles(), src_data_rank=None)
    parallelize(model, mesh, cp=cp, sequence_parallel=True, src_data_rank=None)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(sum_of_parts)


def sum_of_parts(p: Any) -> None:
    """Sums a gradient of which each rank has a part, such as that of a norm. FSDP2 does so itself;
    an optimizer of torch 2.11 would take the part for the sum.
    """
    if any(isinstance(placement, Partial) for placement in p.grad.placements):
        p.grad = p.grad.redistribute(placements=p.placements)


def data_parallel(model: ByteModel, mesh: DeviceMesh) -> None:
    """Gives each rank of the mesh's first two dimensions its own tokens, in place.

    The gradients are the means over the ranks. Weights are gathered block by block if there are
    shards of them.
    """
    grid = mesh[REPLICATE, SHARD]
    shards = mesh[SHARD].size() > 1
    modules: list[nn.Module] = [*model.blocks, model]
    for module in modules:
        fully_shard(module, mesh=grid, reshard_after_forward=shards and module is not model)


def spread(model: ByteModel, mesh: DeviceMesh, cp: ContextParallel | None) -> None:
    """Spreads a model over the ranks of a mesh, in place, of which some may share the tokens of a
    sequence. A collective.
    """
    # on a single tensor-parallel rank too, so that parameters have the same names on every mesh
    tensor_parallel(model, mesh[TENSOR], cp)
    if mesh[REPLICATE].size() * mesh[SHARD].size() > 1:
        data_parallel(model, mesh)
        # the norm of all gradients is then one collective
        mesh[SHARD, TENSOR]._flatten(f"{SHARD}_{TENSOR}")
