"""What one rank of `tests/nn/test_fsdp.py` runs: `python -m tests.support.fsdp_ranks RANK WORLD
STORE`.

Every scenario shards a layer or a model over all ranks, trains it on different data on each and
compares it with the same in one process. Prints the scenarios that failed and why, as JSON.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kda_ops.nn.fsdp import EXACT
from kda_ops.nn.layer import KimiDeltaAttention
from tests.support.oracle import assert_close
from tests.support.processes import run_scenarios

HIDDEN, TOKENS, BF16 = 32, 70, torch.bfloat16
SCENARIOS: dict[str, Callable[[DeviceMesh], None]] = {}


def scenario(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    SCENARIOS[function.__name__] = function
    return function


class Stack(nn.Module):
    """Blocks as models have them, between an embedding and a head that share a weight."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.attention = KimiDeltaAttention(HIDDEN, 8, 2, num_v_heads=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Pair(nn.Module):
    """Two layers, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def layer() -> KimiDeltaAttention:
    return KimiDeltaAttention(HIDDEN, 8, 2)


def inputs(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)


def tokens(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randint(16, (1, TOKENS), generator=generator)


def loss(out: Tensor) -> Tensor:
    return out.float().square().mean()


class Gates(TorchDispatchMode):
    """Dtypes of the gate's parameters wherever an operator gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.name in EXACT:
                self.seen.append(x.dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def exact_gates(layers: int = 1) -> Iterator[None]:
    with Gates() as gates:
        yield
    assert gates.seen == [torch.float32] * (2 * layers), gates.seen


def alone(module: nn.Module, data: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Gradients of the mean of every rank's loss, in one process."""
    for rank in range(dist.get_world_size()):
        (loss(module(data(rank))) / dist.get_world_size()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def assert_gradients(
    sharded: nn.Module,
    original: nn.Module,
    data: Callable[[int, torch.dtype], Tensor],
    compute: torch.dtype,
) -> None:
    """Checks a sharded module's gradients against `original` in its compute dtype, and in fp64."""
    reference = alone(copy.deepcopy(original).to(compute), lambda rank: data(rank, compute))
    exact = copy.deepcopy(original).double()
    fp64 = alone(exact, lambda rank: data(rank, torch.float64))
    for name, p in sharded.named_parameters():
        if p.requires_grad:
            found = p.grad.full_tensor()
            assert found.dtype == p.dtype, name
            assert_close(found, reference[name].to(found.dtype), fp64[name], compute)


def train(module: nn.Module, dtype: torch.dtype, layers: int = 1) -> None:
    with exact_gates(layers):
        out = module(inputs(dist.get_rank(), dtype))
    loss(out).backward()


MIXED = MixedPrecisionPolicy(param_dtype=BF16)
REDUCED_WIDE = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)


@scenario
def layer_in_fp32(mesh: DeviceMesh) -> None:
    original = layer()
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
    train(sharded, torch.float32)
    assert_gradients(sharded, original, inputs, torch.float32)


@scenario
def layer_in_bf16(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
    assert {p.dtype for p in sharded.parameters()} == {BF16, torch.float32}
    train(sharded, BF16)
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def layer_in_bf16_reduced_in_fp32(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh, mp_policy=policy)
    train(sharded, BF16)
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def mixed_precision(mesh: DeviceMesh) -> None:
    for policy in (MIXED, REDUCED_WIDE):
        original = layer()
        sharded = fully_shard(copy.deepcopy(original), mesh=mesh, mp_policy=policy)
        train(sharded, torch.float32)
        assert {p.grad.dtype for p in sharded.parameters()} == {torch.float32}
        assert_gradients(sharded, original, inputs, BF16)


@scenario
def cast_after_sharding(mesh: DeviceMesh) -> None:
    original = layer()
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh).to(BF16)
    assert sharded.A_log.dtype == sharded.dt_bias.dtype == torch.float32
    train(sharded, BF16)
    assert_gradients(sharded, copy.deepcopy(original).to(BF16), inputs, BF16)


@scenario
def accumulated_gradients(mesh: DeviceMesh) -> None:
    """The first of two steps does not reduce, and accumulates in the dtype of the reduction."""
    for policy in (MIXED, REDUCED_WIDE):
        original = layer()
        sharded = fully_shard(copy.deepcopy(original), mesh=mesh, mp_policy=policy)
        for synchronized in (False, True):
            sharded.set_requires_gradient_sync(synchronized)
            train(sharded, torch.float32)
        twice = lambda rank, dtype: inputs(rank, dtype).repeat(2, 1, 1)  # noqa: E731
        for p in sharded.parameters():
            p.grad /= 2
        assert_gradients(sharded, original, twice, BF16)


@scenario
def parts_that_are_frozen(mesh: DeviceMesh) -> None:
    for frozen in (EXACT, ("A_log",), ("o_norm_weight", "in_proj.weight", "conv_weight")):
        original = layer().to(BF16)
        for name, p in original.named_parameters():
            p.requires_grad_(name not in frozen)
        sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
        train(sharded, BF16)
        assert_gradients(sharded, original, inputs, BF16)


@scenario
def parameters_without_a_gradient(mesh: DeviceMesh) -> None:
    """Ranks that do not use a layer of a group send zeros, if requested."""
    original = Pair()
    for policy in (MixedPrecisionPolicy(), MIXED):
        sharded = fully_shard(copy.deepcopy(original), mesh=mesh, mp_policy=policy)
        zeros = hasattr(sharded, "set_reduce_scatter_unused_params")  # not in torch 2.11
        if zeros:
            sharded.set_reduce_scatter_unused_params(True)
        train(sharded, torch.float32)
        for p in sharded.second.parameters():
            assert not p.grad.full_tensor().any() if zeros else p.grad is None
        compute = policy.param_dtype or torch.float32
        assert_gradients(sharded.first, original.first, inputs, compute)


@scenario
def shards_on_the_cpu(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    policy = CPUOffloadPolicy(pin_memory=False)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh, offload_policy=policy)
    train(sharded, BF16)
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def replicas_of_shards(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    grid = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("replicate", "shard"))
    sharded = fully_shard(copy.deepcopy(original), mesh=grid)
    train(sharded, BF16)
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def recomputed_activations(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
    loss(checkpoint(sharded, inputs(dist.get_rank(), BF16), use_reentrant=False)).backward()
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def compiled(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
    compiled = torch.compile(sharded, backend="aot_eager")
    loss(compiled(inputs(dist.get_rank(), BF16))).backward()
    assert_gradients(sharded, original, inputs, BF16)


@scenario
def made_on_meta(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        sharded = fully_shard(layer().to(BF16), mesh=mesh)
    sharded.to_empty(device="cpu")
    original = layer().to(BF16)
    full = {name: x.clone() for name, x in original.state_dict().items()}
    set_model_state_dict(sharded, full, options=StateDictOptions(full_state_dict=True))
    train(sharded, BF16)
    assert_gradients(sharded, original, inputs, BF16)
    sharded.reset_parameters()
    assert sharded.A_log.full_tensor().exp().min() >= 1


@scenario
def state_dicts(mesh: DeviceMesh) -> None:
    original = layer().to(BF16)
    sharded = fully_shard(copy.deepcopy(original), mesh=mesh)
    train(sharded, BF16)
    expected = original.state_dict()
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert list(full) == list(expected) == list(sharded.state_dict())
    for name, x in expected.items():
        assert full[name].dtype == x.dtype == sharded.state_dict()[name].dtype, name
        assert torch.equal(full[name], x), name
    other = fully_shard(layer().to(BF16), mesh=mesh)
    other.load_state_dict(sharded.state_dict())
    x = inputs(0, BF16)
    assert torch.equal(other(x), sharded(x))


def trained(model: nn.Module, ids: Callable[[int], Tensor], ranks: Iterator[int]) -> list[Tensor]:
    """The norms of two steps' gradients, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    kept, ranks = [], list(ranks)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in ranks:
            (loss(model(ids(rank))) / len(ranks)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        kept.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        optimizer.step()
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [x.detach().clone() for x in (*kept, *parameters)]


@scenario
def training_a_model(mesh: DeviceMesh) -> None:
    """Each block a group or none, gathered again for the backward or kept; clipped, momentum."""
    original = Stack()
    everyone = range(dist.get_world_size())
    reference = trained(copy.deepcopy(original), tokens, everyone)
    fp64 = trained(copy.deepcopy(original).double(), tokens, everyone)
    for by_block, reshard in ((True, True), (True, False), (False, True)):
        sharded = copy.deepcopy(original)
        sharded.head.weight = sharded.embedding.weight
        for block in sharded.blocks if by_block else ():
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
        found = trained(sharded, tokens, [dist.get_rank()])
        for out, expected, exact in zip(found, reference, fp64, strict=True):
            assert_close(out, expected, exact)


@scenario
def a_model_in_bf16(mesh: DeviceMesh) -> None:
    original = Stack().to(BF16)
    sharded = copy.deepcopy(original)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with exact_gates(len(sharded.blocks)):
        out = sharded(tokens(dist.get_rank()))
    loss(out).backward()
    assert_gradients(sharded, original, lambda rank, dtype: tokens(rank), BF16)


@scenario
def replicated_data(mesh: DeviceMesh) -> None:
    """DDP, without special support."""
    original = layer().to(BF16)
    replica = DistributedDataParallel(copy.deepcopy(original))
    train(replica, BF16)
    reference = alone(copy.deepcopy(original), lambda rank: inputs(rank, BF16))
    fp64 = alone(copy.deepcopy(original).double(), lambda rank: inputs(rank, torch.float64))
    for name, p in replica.module.named_parameters():
        assert_close(p.grad, reference[name], fp64[name], BF16)


@scenario
def replicated_data_compiled(mesh: DeviceMesh) -> None:
    """DDP with a compiled layer; the first of two steps does not reduce."""
    original = layer().to(BF16)
    replica = DistributedDataParallel(copy.deepcopy(original))
    compiled = torch.compile(replica, backend="aot_eager")
    x = inputs(dist.get_rank(), BF16)
    with replica.no_sync():
        loss(compiled(x)).backward()
    loss(compiled(x)).backward()
    reference = alone(copy.deepcopy(original), lambda rank: inputs(rank, BF16))
    fp64 = alone(copy.deepcopy(original).double(), lambda rank: inputs(rank, torch.float64))
    for name, p in replica.module.named_parameters():
        assert_close(p.grad / 2, reference[name], fp64[name], BF16)


if __name__ == "__main__":
    run_scenarios(SCENARIOS, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
