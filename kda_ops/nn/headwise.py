"""A layer whose parameters are DTensors, sharded by heads: what `kda_ops.nn.parallelize` makes of
one. Why they are sharded as they are stands there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
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

from kda_ops._tracing import open_sizes, reads_values
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec, units_held
from kda_ops.nn.apply import apply
from kda_ops.nn.fsdp import is_fsdp_hook
from kda_ops.nn.input_projection import input_sizes
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.nn.parts import PACKED, part_sizes, split_weight
from kda_ops.nn.states import State


class Layouts(Protocol):
    """How tensors are spread over the ranks, as `HeadwiseParallel` says.

    Attributes:
        input_layouts: Of a layer's input.
        output_layouts: Of its output.
        use_local_output: Whether that is a plain tensor.
        src_data_rank: The rank whose weights are taken.
    """

    input_layouts: Placement
    output_layouts: Placement
    use_local_output: bool
    src_data_rank: int | None


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


def shard_layer(layer: Any, mesh: DeviceMesh, style: Layouts) -> None:
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
    style: Layouts
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
