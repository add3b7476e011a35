"""What one rank of `tests/nn/test_parallel.py` runs: `python -m tests.support.parallel_ranks RANK
WORLD STORE`.

Every scenario shards layers or models by heads over all ranks, and compares them with the same in
one process, in fp64.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from kda_ops import KDABatch, KimiDeltaAttention, load_kimi_linear
from kda_ops.nn import HeadwiseParallel, parallelize, state_dict_by_parts
from kda_ops.nn.fsdp import EXACT
from tests.support import dtensor_ranks
from tests.support.fsdp_ranks import BF16, Gates, loss
from tests.support.oracle import assert_close
from tests.support.processes import run_scenarios

HIDDEN, TOKENS, FP64 = 32, 72, torch.float64
SCENARIOS: dict[str, Callable[[DeviceMesh], None]] = {}
FORMS: dict[str, dict[str, Any]] = {
    "low-rank gates": {"num_heads": 4},
    "value heads of a group": {"num_heads": 4, "num_v_heads": 8, "conv_bias": True},
    "one key head": {"num_heads": 1, "num_v_heads": 4, "expand_v": 2.0},
    "full-rank gates": {
        "num_heads": 4, "forget_gate_rank": None, "output_gate_rank": None, "lower_bound": -5.0,
    },
    "no bias": {
        "num_heads": 4, "output_gate_rank": None, "output_gate_bias": False,
        "use_short_conv": False,
    },
}  # fmt: skip


def scenario(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    SCENARIOS[function.__name__] = function
    return function


def layer(form: str = "value heads of a group", seed: int = 0) -> KimiDeltaAttention:
    torch.manual_seed(seed)
    return KimiDeltaAttention(HIDDEN, 8, **FORMS[form]).double()


def inputs(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).double()


def assert_equal(found: Any, expected: Any, what: str = "") -> None:
    found = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=lambda m: f"{what}: {m}")


def assert_same_gradients(sharded: nn.Module, whole: nn.Module) -> None:
    """By parts, over all ranks."""
    expected = {}
    for p in whole.parameters():
        p.data, p.grad = p.grad, None
    expected = state_dict_by_parts(whole)
    found = {name: p.grad for name, p in sharded.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_equal(gradient, expected[name], name)


def mine(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(layers))
        self.mixers = nn.ModuleList(layer(seed=i) for i in range(layers))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


@scenario
def forward_and_backward(mesh: DeviceMesh) -> None:
    for form in FORMS:
        whole = layer(form)
        sharded = parallelize(copy.deepcopy(whole), mesh)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        x, y = (inputs().requires_grad_() for _ in range(2))
        with CommDebugMode() as comms:
            out = sharded(x)
        counts = {str(k): v for k, v in comms.get_comm_counts().items() if v}
        assert counts == {"c10d_functional.all_reduce": 1}, counts
        expected = whole(y)
        assert_equal(out, expected, form)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert_equal(x.grad, y.grad, form)
        assert_same_gradients(sharded, whole)


@scenario
def a_rank_holds_its_heads(mesh: DeviceMesh) -> None:
    sharded: Any = parallelize(layer(), mesh).float()
    ranks = mesh.size()
    for name, p in sharded.named_parameters():
        shared = name in ("o_norm_weight", "in_proj.f", "in_proj.g")
        assert p.to_local().numel() * (1 if shared else ranks) == p.numel(), name
    spec = sharded.state_spec()
    assert (spec.num_k_heads, spec.num_v_heads, spec.tp_size) == (4, 8, ranks)


@scenario
def sequence_parallel(mesh: DeviceMesh) -> None:
    whole = layer()
    sharded = parallelize(copy.deepcopy(whole), mesh, sequence_parallel=True)
    x, y = mine(inputs(), 1).clone().requires_grad_(), inputs().requires_grad_()
    with CommDebugMode() as comms:
        out = sharded(x)
    counts = {str(k): v for k, v in comms.get_comm_counts().items() if v}
    assert counts == {
        "c10d_functional.all_gather_into_tensor": 1,
        "c10d_functional.reduce_scatter_tensor": 1,
    }, counts
    expected = whole(y)
    assert_equal(out, mine(expected, 1))
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_equal(x.grad, mine(y.grad, 1))
    assert_same_gradients(sharded, whole)


@scenario
def in_a_plan(mesh: DeviceMesh) -> None:
    """In `parallelize_module`, with DTensors in and out."""
    whole = Model()
    sharded = parallelize_module(
        copy.deepcopy(whole),
        mesh,
        {
            "mixers.0": HeadwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "mixers.1": HeadwiseParallel(use_local_output=False),
        },
    )
    x = inputs()
    first = sharded.mixers[0](x)
    assert first.placements == (Shard(1),)
    second = sharded.mixers[1](first)
    assert second.placements == (Replicate(),)
    assert_equal(second, whole.mixers[1](whole.mixers[0](x)))
    assert "ranks=" in repr(sharded)


@scenario
def loading_from_disk(mesh: DeviceMesh) -> None:
    """Every rank reads its heads; FSDP comes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            whole, sharded = layer(form), parallelize(layer(form, seed=1), mesh)
            file = f"{folder}/{form}.safetensors"
            save_file(whole.state_dict(), file)
            load_kimi_linear(file, sharded)
            with torch.no_grad():  # what is packed for it shares the parameters' memory
                assert_equal(sharded(inputs()), whole(inputs()), form)
            assert_equal(sharded(inputs()), whole(inputs()), form)
        for model, options, problem in (
            (sharded, {"tp_size": 2}, "tp_size must be 1 as model is parallel already"),
            (fully_shard(layer(), mesh=mesh), {}, "must be loaded before fully_shard"),
        ):
            with pytest.raises(ValueError, match=problem):
                load_kimi_linear(file, model, **options)


@scenario
def serving(mesh: DeviceMesh) -> None:
    """Prompts, then single tokens, from the states of a rank."""
    for form in FORMS:
        serve(form, mesh, lambda sharded: sharded)


def serve(form: str, mesh: DeviceMesh, run: Callable[[Any], Any]) -> None:
    lengths = [5, 9]
    whole: Any = layer(form).float().requires_grad_(False)
    sharded: Any = parallelize(copy.deepcopy(whole), mesh)
    exact = copy.deepcopy(whole).double()
    states = [x.state_spec().allocate(3) for x in (whole, sharded, whole)]
    states[2] = tuple(None if x is None else x.double() for x in states[2])
    for step in range(3):
        prompts = step == 0
        batch = KDABatch.prefill(lengths, [1, 2]) if prompts else KDABatch.decode([1, 2])
        x = inputs(sum(lengths) if prompts else 2, batch=1)
        with torch.no_grad():
            reference = whole(x.float(), state=states[0], batch=batch)
            found = run(sharded)(x.float(), state=states[1], batch=batch)
            fp64 = exact(x, state=states[2], batch=batch)
        assert_close(found, reference, fp64)
    heads = sharded.state_spec().units_held("recurrent", mesh.get_local_rank())
    own = slice(heads.start, heads.stop)
    assert_close(states[1][1], states[0][1][:, own], states[2][1][:, own])


@scenario
def one_gemm_without_copies(mesh: DeviceMesh) -> None:
    """Without gradients a layer multiplies by the memory that its parameters are views of."""
    sharded: Any = parallelize(layer(), mesh)
    with torch.no_grad():
        weight = sharded.in_proj.weight()
        assert weight is sharded.in_proj.packed
        sharded.in_proj.v.to_local().fill_(3)
        assert (sharded.in_proj.weight() == 3).any()
        sharded.float()
        assert sharded.in_proj.weight() is sharded.in_proj.packed
        assert sharded.in_proj.packed.dtype == torch.float32
        twin = copy.deepcopy(sharded)
        twin.in_proj.q.to_local().fill_(5)
        assert (twin.in_proj.weight() == 5).any()
        assert not (sharded.in_proj.weight() == 5).any()


@scenario
def compiled(mesh: DeviceMesh) -> None:
    """A training step and steps of a server, each in whole graphs with one collective forward."""
    if mesh.size() > 2:  # time: compilation does not depend on the number of ranks
        return
    whole = layer()
    sharded = parallelize(copy.deepcopy(whole), mesh)
    x, y = (inputs().requires_grad_() for _ in range(2))
    from tests.support.graph_code import Graphs  # loads Dynamo

    graphs = Graphs()
    out = torch.compile(sharded, fullgraph=True, backend=graphs)(x)
    expected = whole(y)
    assert_equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_equal(x.grad, y.grad)
    assert_same_gradients(sharded, whole)
    # backward: the input, both gates' first factors and the weight of the norm
    assert [code.count("all_reduce.default(") for code in graphs.code] == [1, 4]
    graphs = Graphs()
    serve(
        "low-rank gates",
        mesh,
        lambda layer: torch.compile(layer, fullgraph=True, backend=graphs),
    )
    # one for prompts, one for single tokens; weights are read where they are
    assert [code.count("all_reduce.default(") for code in graphs.code] == [1, 1]
    assert not any("aten.cat" in code.split("conv")[0] for code in graphs.code)


def shared_folder() -> str:
    """A folder that rank 0 makes."""
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    return str(folder[0])


@scenario
def checkpoints_on_other_meshes(mesh: DeviceMesh) -> None:
    """Saved by all ranks; loaded by half of them, by one, and by a model that is not parallel."""
    for form in FORMS:
        whole = layer(form)
        sharded = parallelize(copy.deepcopy(whole), mesh)
        folder = shared_folder()
        dcp.save(sharded.state_dict(), checkpoint_id=folder)
        expected = state_dict_by_parts(whole)
        assert expected.keys() == sharded.state_dict().keys()

        plain = layer(form, seed=1)
        dcp.load(state_dict_by_parts(plain), checkpoint_id=folder)
        for name, x in state_dict_by_parts(plain).items():
            assert torch.equal(x, expected[name]), name

        grid = grid_of(mesh)
        other = parallelize(layer(form, seed=1), grid["tp"])
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder)
        other.load_state_dict(state)
        for name, x in other.state_dict().items():
            assert torch.equal(x.full_tensor(), expected[name]), name

        # and back: what one process saves
        dcp.save(state_dict_by_parts(whole), checkpoint_id=folder)
        third = parallelize(layer(form, seed=1), mesh)
        state = third.state_dict()
        dcp.load(state, checkpoint_id=folder)
        for name, x in third.state_dict().items():
            assert torch.equal(x.full_tensor(), expected[name]), name


@scenario
def plain_state_dicts(mesh: DeviceMesh) -> None:
    """Packed weights into a parallel layer, parts into a plain one, and `load_checkpoint`."""
    whole = layer()
    for load in ("load_state_dict", "load_checkpoint"):
        sharded = parallelize(layer(seed=1), mesh)
        getattr(sharded, load)(whole.state_dict())
        for name, x in sharded.state_dict().items():
            assert torch.equal(x.full_tensor(), state_dict_by_parts(whole)[name]), name
        plain = layer(seed=1)
        getattr(plain, load)(dict(sharded.state_dict()))
        assert_equal(plain(inputs()), whole(inputs()))
    with_prefix = parallelize(Model(1), mesh)
    with_prefix.load_state_dict(Model(1).state_dict())
    assert_equal(with_prefix(inputs()), Model(1)(inputs()))


@scenario
def trained_and_clipped(mesh: DeviceMesh) -> None:
    """Norms count what several ranks have once; replicas stay equal."""
    for form in FORMS:
        whole = layer(form)
        sharded = parallelize(copy.deepcopy(whole), mesh)
        for module in (whole, sharded):
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            norms = []
            for _ in range(2):
                optimizer.zero_grad()
                module(inputs()).square().sum().backward()
                norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
                norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
                optimizer.step()
            module.norms = norms
        for found, expected in zip(sharded.norms, whole.norms, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        for name, x in sharded.state_dict().items():
            torch.testing.assert_close(
                x.full_tensor(), state_dict_by_parts(whole)[name], rtol=0, atol=1e-7, msg=name
            )


@scenario
def weights_of_the_first_rank(mesh: DeviceMesh) -> None:
    sharded = parallelize(layer(seed=mesh.get_rank()), mesh)
    assert_equal(sharded(inputs()), layer(seed=0)(inputs()))


@scenario
def made_on_meta(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        sharded = parallelize(KimiDeltaAttention(HIDDEN, 8, **FORMS["low-rank gates"]), mesh)
    sharded.double().to_empty(device="cpu")
    sharded.load_state_dict(layer("low-rank gates").state_dict())
    assert_equal(sharded(inputs()), layer("low-rank gates")(inputs()))
    sharded.reset_parameters()
    assert sharded.A_log.full_tensor().exp().min() >= 1


# ---------------------------------------------------------------------- with FSDP2


def grid_of(mesh: DeviceMesh) -> DeviceMesh:
    """Data parallel over two, tensor parallel over the rest."""
    return init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "tp"))


def data(rank: int, dtype: torch.dtype = FP64) -> Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)


def mean_loss(module: nn.Module, dtype: torch.dtype = FP64) -> None:
    """The mean loss of both data-parallel ranks, in one process."""
    for rank in range(2):
        (loss(module(data(rank, dtype))) / 2).backward()


@scenario
def with_fsdp_in_bf16(mesh: DeviceMesh) -> None:
    """A layer in bf16, and one in fp32 under a policy; the gate stays in fp32 and is exact."""
    grid = grid_of(mesh)
    for policy, stored in (
        (MixedPrecisionPolicy(), BF16),
        (MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32), torch.float32),
    ):
        original = layer("low-rank gates").float().to(stored)
        sharded: Any = parallelize(copy.deepcopy(original), grid["tp"])
        fully_shard(sharded, mesh=grid["dp"], mp_policy=policy)
        assert sharded.A_log.dtype == sharded.dt_bias.dtype == torch.float32
        with Gates() as gates:
            out = sharded(data(grid["dp"].get_local_rank(), stored))
        assert gates.seen == [torch.float32] * 2
        assert out.dtype == BF16
        loss(out).backward()
        reference, exact = copy.deepcopy(original).to(BF16), copy.deepcopy(original).double()
        mean_loss(reference, BF16)
        mean_loss(exact)
        expected, fp64 = (gradients_by_parts(x) for x in (reference, exact))
        for name, p in sharded.named_parameters():
            assert p.grad.dtype == p.dtype == (torch.float32 if name in EXACT else stored), name
            found = p.grad.full_tensor()
            assert_close(found, expected[name].to(found.dtype), fp64[name], BF16)


def gradients_by_parts(whole: nn.Module) -> dict[str, Tensor]:
    for p in whole.parameters():
        p.data, p.grad = p.grad.to(p.dtype), None
    return state_dict_by_parts(whole)


@scenario
def training_a_model_on_a_grid(mesh: DeviceMesh) -> None:
    """Sequence parallel, a group per layer, clipped, AdamW; checkpoints of model and optimizer."""
    grid = grid_of(mesh)
    tp, dp = grid["tp"], grid["dp"]
    whole = Model()
    sharded: Any = copy.deepcopy(whole)
    norms = {f"norms.{i}": SequenceParallel(use_local_output=True) for i in range(2)}
    parallelize_module(sharded, tp, norms)
    parallelize(sharded, tp, sequence_parallel=True)
    for mixer in sharded.mixers:
        fully_shard(mixer, mesh=dp)
    fully_shard(sharded, mesh=dp)
    kept = []
    for module in (whole, sharded):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            if module is whole:
                mean_loss(module)
            else:
                tokens = data(dp.get_local_rank()).chunk(tp.size(), 1)[tp.get_local_rank()]
                (loss(module(tokens)) / tp.size()).backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 0.01)
            found.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.step()
        kept.append(found)
    for a, b in zip(*kept, strict=True):
        assert_equal(a, b, "norm")
    expected = state_dict_by_parts(whole)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert full.keys() == expected.keys()
    for name, x in full.items():
        assert_equal(x, expected[name], name)

    # model and optimizer, by all ranks, to a model over other ranks
    folder = shared_folder()
    model_state, optimizer_state = get_state_dict(sharded, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    other: Any = Model()
    parallelize_module(other, mesh, norms)
    parallelize(other, mesh, sequence_parallel=True)
    again = torch.optim.AdamW(other.parameters(), lr=1e-2, eps=1e-3)
    model_state, optimizer_state = get_state_dict(other, again)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(other, again, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for name, p in other.named_parameters():
        assert torch.equal(p.full_tensor(), full[name]), name
    moments = {
        name: optimizer.state[p]["exp_avg"].full_tensor() for name, p in sharded.named_parameters()
    }
    for name, p in other.named_parameters():
        assert torch.equal(again.state[p]["exp_avg"].full_tensor(), moments[name]), name

    # and from a full state dict
    third: Any = parallelize(Model(), tp, sequence_parallel=True)
    fully_shard(third, mesh=dp)
    set_model_state_dict(third, dict(full), options=StateDictOptions(full_state_dict=True))
    for name, p in third.named_parameters():
        assert torch.equal(p.full_tensor(), full[name]), name


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


@scenario
def refusals(mesh: DeviceMesh) -> None:
    ranks, rank = mesh.size(), mesh.get_rank()
    assert "num_v_heads" in refusal(
        lambda: parallelize(KimiDeltaAttention(HIDDEN, 8, 1, num_v_heads=1), mesh)
    )
    assert "num_heads" in refusal(
        lambda: parallelize(KimiDeltaAttention(HIDDEN, 8, 3, num_v_heads=3 * ranks), mesh)
    )
    assert "without any" in refusal(lambda: parallelize(nn.Linear(2, 2), mesh))
    twice = parallelize(layer(), mesh)
    assert "already" in refusal(lambda: parallelize(twice, mesh))
    assert "input_layouts" in refusal(lambda: HeadwiseParallel(input_layouts=Shard(0)))
    # one rank's mistake is everybody's
    assert "rank" in refusal(lambda: parallelize(layer() if rank else nn.Linear(2, 2), mesh)) or (
        rank == 0
    )
    assert "same layers" in refusal(
        lambda: parallelize(layer(), mesh, sequence_parallel=rank == ranks - 1)
    )
    odd: Any = layer()
    odd.A_log.requires_grad_(rank != ranks - 1)  # its gradient is no collective, others are
    assert "same layers" in refusal(lambda: parallelize(odd, mesh))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run_scenarios(
        SCENARIOS | dtensor_ranks.SCENARIOS, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    )
