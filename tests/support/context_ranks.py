"""What one rank of `tests/nn/test_context.py` runs: `python -m tests.support.context_ranks RANK
WORLD STORE`.

Every scenario spreads the tokens of sequences over all ranks, and compares outputs and gradients
with those of one process, in fp64.
"""

import copy
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from kda_ops import KDABatch, KimiDeltaAttention, prepare_chunk_indices, short_conv
from kda_ops.fused import chunk_kda_gated
from kda_ops.nn import (
    ContextParallel,
    context_chunk_kda,
    context_history,
    context_short_conv,
    parallelize,
    state_dict_by_parts,
)
from tests.support.parallel_ranks import HIDDEN, assert_equal, layer, refusal
from tests.support.processes import run_scenarios

SCENARIOS: dict[str, Callable[[DeviceMesh], None]] = {}
ORDERS = ("contiguous", "zigzag")
H, HV, K, V, W = 2, 4, 8, 16, 4

# tokens per part, and of the packed sequences the lengths, as shares of all tokens; None: dense
CASES: dict[str, tuple[int, list[float] | None]] = {
    "dense, two chunks": (70, None),
    "dense, parts of one token": (1, None),
    "dense, parts shorter than the history": (2, None),
    "packed, across all ranks": (9, [1.0]),
    "packed, across some": (13, [0.1, 0.33, 0.0, 0.37, 0.2]),
    "packed, at the borders of parts": (6, [0.25, 0.25, 0.5, 0.0]),
    "packed, many in a part": (16, [0.02] * 10 + [0.4] + [0.04] * 10),
    "packed, parts of padding": (5, [0.1, 0.2]),
    "packed, padding alone": (3, [0.0]),
    "packed, parts of one token": (1, [0.3, 0.7]),
    "packed, parts shorter than the history": (2, [0.3, 0.0, 0.6]),
}


def scenario(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    SCENARIOS[function.__name__] = function
    return function


def offsets_of(shares: list[float] | None, tokens: int) -> Tensor | None:
    if shares is None:
        return None
    ends = (torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0) * tokens).round()
    return ends.to(torch.int32)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def total(x: Tensor, group: Any = None) -> Tensor:
    """The sum over the ranks."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def counts(comms: CommDebugMode) -> dict[str, int]:
    found = {str(k).rpartition(".")[2]: v for k, v in comms.get_comm_counts().items() if v}
    return found


def every_case(mesh: DeviceMesh) -> Any:
    """(what, context, tokens of all ranks, offsets) of all cases in both orders."""
    for order in ORDERS:
        context = ContextParallel(mesh, order)
        for name, (size, shares) in CASES.items():
            tokens = size * context.ranks.size * context.ranks.parts
            yield f"{order}, {name}", context, tokens, offsets_of(shares, tokens)


@scenario
def recurrence(mesh: DeviceMesh) -> None:
    """Outputs, final states, and the gradients of everything, initial states included."""
    for what, context, T, cu_seqlens in every_case(mesh):
        B = 2 if cu_seqlens is None else 1
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        rows = {
            "q": numbers(B, T, H, K, seed=1),
            "k": numbers(B, T, H, K, seed=2),
            "v": numbers(B, T, HV, V, seed=3),
            "raw_gate": numbers(B, T, HV, K, seed=4),
            "raw_beta": numbers(B, T, HV, seed=5),
        }
        shared = {
            "A_log": numbers(HV, seed=6),
            "dt_bias": numbers(HV * K, seed=7),
            "initial_state": numbers(N, HV, V, K, seed=8),
        }
        weights = numbers(B, T, HV, V, seed=9), numbers(N, HV, V, K, seed=10)
        options: Any = {
            "qk_norm_eps": 1e-6,
            "output_final_state": True,
            "cu_seqlens": cu_seqlens,
        }
        whole = {name: x.clone().requires_grad_() for name, x in (rows | shared).items()}
        o, final = chunk_kda_gated(**whole, **options)
        assert final is not None
        ((o * weights[0]).sum() + (final * weights[1]).sum()).backward()

        mine = {name: context.shard(x).requires_grad_() for name, x in rows.items()}
        mine |= {name: x.clone().requires_grad_() for name, x in shared.items()}
        with CommDebugMode() as comms:
            my_o, my_final = context_chunk_kda(context, **mine, **options)
        assert counts(comms) == {"all_gather_into_tensor": 1}, what
        with CommDebugMode() as comms:
            loss = (my_o * context.shard(weights[0])).sum() + (my_final * weights[1]).sum()
            loss.backward()
        assert counts(comms) == {"all_gather_into_tensor": 1}, what
        assert_equal(my_o, context.shard(o), what)
        assert_equal(total(my_final.detach()), final, what)
        for name, x in mine.items():
            expected = whole[name].grad
            if name in rows:
                assert_equal(x.grad, context.shard(expected), f"{what}: {name}")
            else:
                assert_equal(total(x.grad), expected, f"{what}: {name}")


@scenario
def convolution(mesh: DeviceMesh) -> None:
    for what, context, T, cu_seqlens in every_case(mesh):
        B = 2 if cu_seqlens is None else 1
        x, weight, bias = numbers(B, T, 6), numbers(6, W), numbers(6)
        factors = numbers(B, T, 6, seed=1)
        whole = [y.clone().requires_grad_() for y in (x, weight, bias)]
        y = short_conv(*whole, cu_seqlens=cu_seqlens)
        (y * factors).sum().backward()
        mine = [y.clone().requires_grad_() for y in (context.shard(x), weight, bias)]
        my_y = context_short_conv(context, *mine, cu_seqlens=cu_seqlens)
        (my_y * context.shard(factors)).sum().backward()
        assert_equal(my_y, context.shard(y), what)
        assert_equal(mine[0].grad, context.shard(whole[0].grad), what)
        for a, b in zip(mine[1:], whole[1:], strict=True):
            assert_equal(total(a.grad), b.grad, what)


def check_layer(
    whole: KimiDeltaAttention,
    mine: nn.Module,
    context: ContextParallel,
    cu_seqlens: Tensor | None,
    what: str,
    run: Callable[[Any], Any] = lambda layer: layer,
) -> None:
    """A layer's output and gradients, whose tokens are spread, against those of the whole one."""
    T = 24 * context.ranks.parts * context.ranks.size
    x = numbers(1 if cu_seqlens is not None else 2, T, HIDDEN)
    factors = numbers(*x.shape, seed=1)
    a, b = x.clone().requires_grad_(), context.shard(x).requires_grad_()
    expected = whole(a, cu_seqlens=cu_seqlens)
    found = run(mine)(b, cu_seqlens=cu_seqlens)
    assert_equal(found, context.shard(expected), what)
    (expected * factors).sum().backward()
    (found * context.shard(factors)).sum().backward()
    assert_equal(b.grad, context.shard(a.grad), what)
    for p in whole.parameters():
        p.data, p.grad = p.grad, None
    by_parts = any(isinstance(p, DTensor) for p in mine.parameters())
    wanted = state_dict_by_parts(whole) if by_parts else whole.state_dict()
    for name, p in mine.named_parameters():
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert_equal(total(gradient, context.mesh.get_group()), wanted[name], f"{what}: {name}")


@scenario
def layers(mesh: DeviceMesh) -> None:
    for order, form, shares in (
        ("contiguous", "value heads of a group", None),
        ("zigzag", "low-rank gates", [0.3, 0.0, 0.55]),
        ("zigzag", "no bias", None),
    ):
        context = ContextParallel(mesh, order)
        whole = layer(form)
        mine = parallelize(copy.deepcopy(whole), cp=context)
        assert copy.deepcopy(mine).context is context
        T = 24 * context.ranks.parts * context.ranks.size
        check_layer(whole, mine, context, offsets_of(shares, T), f"{order}, {form}")


@scenario
def heads_and_tokens(mesh: DeviceMesh) -> None:
    """Tensor and context parallel at once, of 4 ranks 2 each."""
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    context = ContextParallel(grid["cp"], "zigzag")
    whole, cu_seqlens = layer(), offsets_of([0.3, 0.6], 96)
    mine = parallelize(copy.deepcopy(whole), grid["tp"], cp=context)
    # one after the other, with the tokens of a rank sharded again between the layers
    twice: Any = parallelize(copy.deepcopy(whole), grid["tp"], sequence_parallel=True)
    parallelize(twice, cp=context)
    x = numbers(1, 96, HIDDEN)
    expected = context.shard(whole(x, cu_seqlens=cu_seqlens).detach())
    part = grid["tp"].get_local_rank()
    with torch.no_grad():
        found = twice(context.shard(x).chunk(2, 1)[part], cu_seqlens=cu_seqlens)
    assert_equal(found, expected.chunk(2, 1)[part])
    check_layer(whole, mine, context, cu_seqlens, "2 x 2")


@scenario
def gradients_reduced_by_fsdp(mesh: DeviceMesh) -> None:
    """As in data parallelism over the same ranks; frozen parameters get none."""
    whole = layer()
    whole.A_log.requires_grad_(False)
    mine: Any = parallelize(copy.deepcopy(whole), cp=ContextParallel(mesh))
    fully_shard(mine, mesh=mesh)
    x = numbers(1, 8 * mesh.size(), HIDDEN)
    whole(x).square().mean().backward()
    mine(mine.context.shard(x)).square().mean().backward()
    for name, p in whole.named_parameters():
        found = mine.get_parameter(name).grad
        assert (found is None) == (p.grad is None) == (name == "A_log"), name
        if found is not None:
            assert_equal(found, p.grad, name)


@scenario
def compiled(mesh: DeviceMesh) -> None:
    """One graph forward and one backward, with the collectives in them."""
    if mesh.size() > 2:  # time: compilation does not depend on the number of ranks
        return
    from tests.support.graph_code import Graphs  # loads Dynamo

    context = ContextParallel(mesh, "zigzag")
    whole = layer()
    mine = parallelize(copy.deepcopy(whole), cp=context)
    graphs = Graphs()
    cu_seqlens = offsets_of([0.3, 0.0, 0.55], 96)
    check_layer(
        whole, mine, context, cu_seqlens, "compiled",
        lambda layer: torch.compile(layer, fullgraph=True, backend=graphs),
    )  # fmt: skip
    found = [code.count("all_gather_into_tensor.default(") for code in graphs.code]
    assert found == [2, 2], found  # of maps and rows, forward and backward
    passes = [re.findall(r"kda_ops\.(chunk_\w+)\.default\(", code) for code in graphs.code]
    assert passes == [["chunk_kda_gated_affine"], ["chunk_kda_gated_backward"]], passes


@scenario
def tokens_to_ranks_and_back(mesh: DeviceMesh) -> None:
    for order in ORDERS:
        context = ContextParallel(mesh, order)
        tokens = torch.arange(2 * 19).view(2, 19)
        mine = context.shard(tokens, fill=-100)
        assert torch.equal(context.gather(mine, tokens=19), tokens)
        padded = context.gather(mine)
        assert padded[:, :19].equal(tokens)
        assert (padded[:, 19:] == -100).all()
        assert padded.shape[1] % (context.ranks.size * context.ranks.parts) == 0
        last = numbers(3, 19)
        assert torch.equal(context.gather(context.shard(last, dim=-1), dim=-1, tokens=19), last)


@scenario
def refusals(mesh: DeviceMesh) -> None:
    context, rank = ContextParallel(mesh, "zigzag"), mesh.get_rank()
    assert "order" in refusal(lambda: ContextParallel(mesh, "striped"))
    assert "neither" in refusal(lambda: parallelize(layer()))
    assert "cp must be" in refusal(lambda: parallelize(layer(), cp=mesh))
    assert "without any" in refusal(lambda: parallelize(nn.Linear(2, 2), cp=context))
    mine: Any = parallelize(layer(), cp=context)
    assert "already" in refusal(lambda: parallelize(mine, cp=context))
    x = numbers(1, 8, HIDDEN)
    assert "multiple of 2" in refusal(lambda: mine(x[:, :3]))
    assert "at least one" in refusal(lambda: mine(x[:, :0]))
    assert "output_state" in refusal(lambda: mine(x, output_state=True))
    offsets = torch.tensor([0, 8 * mesh.size() + 1])
    assert "cu_seqlens" in refusal(lambda: mine(x, cu_seqlens=offsets))
    assert "chunk_indices" in refusal(
        lambda: mine(x, cu_seqlens=offsets, chunk_indices=prepare_chunk_indices(offsets, 8))
    )
    mine = mine.float()
    state, batch = mine.state_spec().allocate(2), KDABatch.prefill([8], [1])
    assert "state must be None" in refusal(lambda: mine(x.float(), state=state, batch=batch))
    # one rank's mistake is everybody's
    other = ContextParallel(mesh, "contiguous" if rank else "zigzag")
    odd: Any = layer()
    assert "same layers" in refusal(lambda: parallelize(odd, cp=other))
    assert odd.context is None
    assert "rank" in refusal(
        lambda: parallelize(layer() if rank else nn.Linear(2, 2), cp=context)
    ) or (rank == 0)
    rows = numbers(1, 4, 3).requires_grad_()
    before = context_history(context, rows, 1)
    (slope,) = torch.autograd.grad(before.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        context.gather(x.requires_grad_())


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run_scenarios(SCENARIOS, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
