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

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from kda_ops._tracing import open_sizes, reads_values
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec, units_held
from kda_ops.nn.apply import apply
from kda_ops.nn.context import ContextParallel, check_mesh
from kda_ops.nn.fsdp import is_fsdp_hook
from kda_ops.nn.input_projection import input_sizes
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.nn.parts import PACKED, part_sizes, split_weight
from kda_ops.nn.states import State

__all__ = ["HeadwiseParallel", "ParallelKimiDeltaAttention", "parallelize"]


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
        layers, problem = layers_of(module, device_mesh)
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
    layers, problem = layers_of(module, mesh)
    agree(layers, problem, mesh, style, cp)
    for _, layer in layers:
        if mesh is not None:
            shard_layer(layer, mesh, style)
        if cp is not None:
            layer.context = cp
    return module


# ---------------------------------------------------------------------- checks


def layers_of(
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


# ---------------------------------------------------------------------- parameters


class Parts(nn.Module):
    """The parts of a packed weight, in their order.

    Attributes:
        packed: What this rank multiplies by, whose memory the parts share; None if they do not.
        shares: Whether they may.
        rows: The rows of each part's local tensor that this rank uses.
        pad: Rows of zeros at the end.
    """

    def __init__(
        self, parts: dict[str, DTensor], rows: dict[str, slice], pad: int, requires_grad: bool
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part, requires_grad=requires_grad))
        self.rows, self.pad = rows, pad
        self.shares = all(rows[name] == slice(None) for name in parts)
        self.packed: Tensor | None = None
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Moves the parts into one tensor. The parameters stay the same objects."""
        self.packed = None
        if not self.shares:
            return
        own = self.local_parts()
        packed = join(list(own.values()), self.pad)
        if not reads_values(packed):
            return
        start = 0
        for name, part in list(self.named_parameters()):
            rows = packed[start : start + len(own[name])]
            start += len(rows)
            # as a storage of its own: a DTensor of a view with an offset cannot be copied
            rows = torch.from_dlpack(rows)
            fresh = nn.Parameter(
                DTensor.from_local(rows, part.device_mesh, part.placements, run_check=False),
                requires_grad=part.requires_grad,
            )
            fresh.grad = part.grad
            torch.utils.swap_tensors(part, fresh)
        self.packed = packed

    def local_parts(self) -> dict[str, Tensor]:
        """What this rank has of each part, differentiable."""
        return {name: local(part) for name, part in self.named_parameters()}

    def weight(self) -> Tensor:
        """What this rank multiplies by."""
        packed = self.packed
        if packed is not None and not torch.is_grad_enabled() and self.is_packed(packed):
            return packed
        return join([x[self.rows[name]] for name, x in self.local_parts().items()], self.pad)

    def is_packed(self, packed: Tensor) -> bool:
        """Whether the parts are still views of it; a compiled graph relies on the events below."""
        if torch.compiler.is_compiling():
            return True
        address = packed.data_ptr()
        for part in self.parameters():
            x = part.to_local() if isinstance(part, DTensor) else part
            if x.data_ptr() != address or x.dtype != packed.dtype:
                return False
            address += x.numel() * x.element_size()
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Parts:
        super()._apply(fn, recurse)
        self.pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.packed is None or not self.is_packed(self.packed):  # assign=True
            self.pack()

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> Any:
        """As in `nn.Module`. FSDP2 calls it for each parameter that it shards."""
        if is_fsdp_hook(hook):
            self.shares, self.packed = False, None
        return super().register_load_state_dict_post_hook(hook)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


def join(parts: list[Tensor], pad: int) -> Tensor:
    """One tensor of the rows of several."""
    if pad:
        parts = [*parts, parts[0].new_zeros(pad, *parts[0].shape[1:])]
    return torch.cat(parts)


def local(p: Any) -> Any:
    """This rank's part of a parameter. The gradients of what all ranks have are summed."""
    if not isinstance(p, DTensor):
        return p
    if torch.is_grad_enabled() and p.placements[0].is_replicate():
        return p.redistribute(placements=p.placements).to_local(grad_placements=[Partial()])
    return p.to_local()


def shard_layer(layer: Any, mesh: DeviceMesh, style: HeadwiseParallel) -> None:
    """Replaces the parameters of a layer by DTensors, and its class."""
    H, ranks = layer.num_heads, mesh.size()
    wide = {"q", "k"} if ranks > H else set()
    whole = {x for x, p in (("f", layer.f_proj), ("g", layer.g_proj)) if p is not None} | wide
    held = units_held(H, ranks, mesh.get_local_rank())
    K = layer.head_k_dim
    own = slice(held.start * K, held.stop * K)
    rows = {name: own if name in wide else slice(None) for name in layer.in_sizes}
    sizes = local_sizes(layer, ranks)

    def distributed(x: Tensor, placement: Placement) -> DTensor:
        return distribute_tensor(x.detach(), mesh, [placement], src_data_rank=style.src_data_rank)

    for packed, base in PACKED.items():
        weight = layer.get_parameter(packed) if base == "in_proj" else getattr(layer, base)
        if weight is None:
            continue
        parts = {
            name.removeprefix(f"{base}."): part
            for name, part in split_weight(layer, packed, weight).items()
        }
        sharded = {
            name: distributed(part, Replicate() if name in whole else Shard(0))
            for name, part in parts.items()
        }
        pad = sizes["pad"] if base == "in_proj" else 0
        delattr(layer, base)
        setattr(layer, base, Parts(sharded, rows, pad, weight.requires_grad))
    for name, p in list(layer.named_parameters()):
        if isinstance(p, DTensor):
            continue
        placement: Placement = Shard(0)
        if name == "o_norm_weight":
            placement = Replicate()
        elif name == "o_proj.weight":
            placement = Shard(1)
        path, _, attribute = name.rpartition(".")
        sharded_p = nn.Parameter(distributed(p, placement), requires_grad=p.requires_grad)
        setattr(layer.get_submodule(path), attribute, sharded_p)
    layer.__class__ = ParallelKimiDeltaAttention
    layer.mesh, layer.style, layer.local_in_sizes = mesh, style, sizes


def local_sizes(layer: KimiDeltaAttention, ranks: int) -> dict[str, int]:
    """`in_sizes` of one rank."""
    key_dim = len(units_held(layer.num_heads, ranks, 0)) * layer.head_k_dim
    value_heads = layer.num_v_heads // ranks
    f, g = layer.f_proj, layer.g_proj
    separate = "g" not in layer.in_sizes
    return input_sizes(
        key_dim,
        value_heads * layer.head_v_dim,
        value_heads * layer.head_k_dim,
        value_heads,
        None if f is None else layer.in_sizes["f"],
        None if g is None or separate else layer.in_sizes["g"],
        separate,
    )


# ---------------------------------------------------------------------- the layer


class LocalLinear:
    """A projection with one rank's weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LocalLayer:
    """One rank's share of a layer, with the attributes that `kda_ops.nn.apply` reads of a layer."""

    def __init__(self, layer: ParallelKimiDeltaAttention) -> None:
        sizes = layer.local_in_sizes
        self.in_sizes = sizes
        self.hidden_size = layer.hidden_size
        self.head_k_dim, self.head_v_dim = layer.head_k_dim, layer.head_v_dim
        self.num_v_heads = sizes["b"]
        self.key_dim, self.value_dim = sizes["q"], sizes["v"]
        self.num_heads = self.key_dim // self.head_k_dim
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.use_short_conv, self.conv_size = layer.use_short_conv, layer.conv_size
        self.conv_layout = layer.conv_layout
        self.allow_neg_eigval, self.lower_bound = layer.allow_neg_eigval, layer.lower_bound
        self.norm_eps, self.context = layer.norm_eps, layer.context
        parts: Any = layer
        self.in_proj = LocalLinear(parts.in_proj.weight())
        self.conv_weight = None if layer.conv_weight is None else parts.conv_weight.weight()
        self.conv_bias = None if layer.conv_bias is None else parts.conv_bias.weight()
        self.A_log, self.dt_bias = local(layer.A_log), local(layer.dt_bias)
        self.o_norm_weight = local(layer.o_norm_weight)
        self.f_proj, self.g_proj = linear(layer.f_proj), linear(layer.g_proj)
        self.o_proj = linear(layer.o_proj)


def linear(projection: nn.Linear | None) -> LocalLinear | None:
    if projection is None:
        return None
    bias = None if projection.bias is None else local(projection.bias)
    return LocalLinear(local(projection.weight), bias)


class ParallelKimiDeltaAttention(KimiDeltaAttention):
    """A `KimiDeltaAttention` whose parameters are DTensors: what `parallelize` makes of one.

    `num_heads`, `in_sizes` and the other sizes are those of the whole layer. Forward hooks on its
    projections are not called: their weights are read directly.
    """

    mesh: DeviceMesh
    style: HeadwiseParallel
    local_in_sizes: dict[str, int]

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the whole layer, packed."""
        bases = {base: packed for packed, base in PACKED.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, p in self.named_parameters():
            packed = bases.get(name.partition(".")[0])
            if packed is None:
                shapes[name] = tuple(p.shape)
            else:
                shapes[packed] = (sum(part_sizes(self, packed).values()), *p.shape[1:])
        return shapes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.mesh.size()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelKimiDeltaAttention:
        memo[id(self.mesh)] = self.mesh  # its process groups are not copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(vars(self), memo))
        return twin

    def adapt_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Splits packed weights into parts, and takes this rank's share of plain tensors."""
        for packed in PACKED:
            weight = state_dict.pop(prefix + packed, None)
            if weight is not None:
                for name, part in split_weight(self, packed, weight).items():
                    state_dict[prefix + name] = part
        for name, p in self.named_parameters():
            x = state_dict.get(prefix + name)
            if x is None or isinstance(x, DTensor) or not isinstance(p, DTensor):
                continue
            if p.device_mesh == self.mesh and tuple(x.shape) == tuple(p.shape):
                state_dict[prefix + name] = distribute_tensor(
                    x.to(p.device), self.mesh, p.placements, src_data_rank=None
                )

    def state_spec(
        self, *, num_spec: int = 0, recurrent_dtype: Any = "auto", transfer: bool = False
    ) -> KDAStateSpec:
        """As in `KimiDeltaAttention`, for the heads of one rank (`tp_size` is that of the mesh)."""
        return self.make_spec(
            self.mesh.size(), num_spec=num_spec, recurrent_dtype=recurrent_dtype, transfer=transfer
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        batch: KDABatch | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        output_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """As in `KimiDeltaAttention`, on every rank of the mesh at once.

        `hidden_states` and the output are as the style says, the states are those of this rank's
        heads, and everything else is the same on every rank.
        """
        if isinstance(batch, KDABatch) and torch.compiler.is_dynamo_compiling():
            open_sizes(batch, hidden_states)
        share: Any = LocalLayer(self)
        found = apply(
            share,
            self.gathered(hidden_states),
            state,
            batch,
            cu_seqlens,
            chunk_indices,
            output_state=output_state,
        )
        if isinstance(found, tuple):
            return self.reduced(found[0]), found[1]
        return self.reduced(found)

    def gathered(self, x: Tensor) -> Tensor:
        """All hidden states; the gradients of the ranks are summed."""
        placement = self.style.input_layouts
        if not isinstance(x, DTensor):
            if placement.is_replicate() and not (torch.is_grad_enabled() and x.requires_grad):
                return x
            x = DTensor.from_local(x, self.mesh, [placement], run_check=False)
        x = x.redistribute(self.mesh, [Replicate()])
        return x.to_local(grad_placements=[Partial()])

    def reduced(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        output = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        output = output.redistribute(self.mesh, [self.style.output_layouts])
        return output.to_local() if self.style.use_local_output else output
