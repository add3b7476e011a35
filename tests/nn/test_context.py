"""Sequences whose tokens are spread over 2 and 4 ranks: the recurrence, the convolution, the layer.

`tests/support/context_ranks.py` has the scenarios; all of them run in the same processes, once.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.fused import chunk_kda_gated
from kda_ops.nn import ContextParallel, context_chunk_kda, context_scan
from tests.support.backward import launch
from tests.support.context_ranks import SCENARIOS
from tests.support.oracle import assert_close
from tests.support.processes import failures_of

BF16 = torch.bfloat16


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Failures by scenario and rank."""
    store = tmp_path_factory.mktemp("context") / "store"
    return failures_of("tests.support.context_ranks", request.param, store)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@pytest.fixture
def one_rank() -> Iterator[ContextParallel]:
    """A context of this process alone, with two parts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ContextParallel(init_device_mesh("cpu", (1,)), "zigzag")
    dist.destroy_process_group()


@pytest.mark.interpreter
def test_kernels(one_rank: ContextParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the GPU's kernels: one pass over the tokens forward, and one backward."""
    from kda_ops.delta_rule.chunk_kda_gated_affine.kernel import launch_chunk_kda_gated_affine

    names = [x.name for x in chunk_kda_gated_op._schema.arguments]
    passes: list[Any] = []  # of the kernels, backward the gradients

    def backward(*args: Any) -> tuple[Tensor, ...]:
        inputs, needs = dict(zip(names, args, strict=False)), args[-1]
        found = dict(
            zip(
                [n for n, need in zip(names, needs, strict=True) if need],
                launch("chunk_kda_gated", inputs, list(args[15:17]), needs),
                strict=True,
            )
        )
        passes.append(len(found))
        tensors = [*names[:7], "initial_state"]
        return tuple(found.get(name, torch.empty(0)) for name in tensors)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        passes.append("forward")
        return launch_chunk_kda_gated_affine(*args)

    both = (forward, backward)
    monkeypatch.setattr(context_scan, "operators", lambda namespace: both)
    T, HV, K = 80, 2, 64
    rows = {name: torch.randn(1, T, 1, K).to(BF16) for name in ("q", "k")}
    rows |= {name: torch.randn(1, T, HV, K).to(BF16) for name in ("v", "raw_gate")}
    rows["raw_beta"] = torch.randn(1, T, HV).to(BF16)
    states = {"A_log": torch.randn(HV), "initial_state": torch.randn(3, HV, K, K)}
    weights = torch.randn(1, T, HV, K), torch.randn(3, HV, K, K)
    cu_seqlens = torch.tensor([0, 20, 60, 76], dtype=torch.int32)  # the parts meet at 40

    def results(call: Any, wide: bool) -> list[Tensor]:
        given = rows | states
        x = {n: (y.double() if wide else y.clone()).requires_grad_() for n, y in given.items()}
        o, final = call(**x, qk_norm_eps=1e-6, output_final_state=True, cu_seqlens=cu_seqlens)
        loss = (o * weights[0]).sum() + (final * weights[1]).sum()
        return [o, final, *torch.autograd.grad(loss, list(x.values()))]

    found = results(lambda **given: context_chunk_kda(one_rank, **given), False)
    assert passes == ["forward", 7]
    low, exact = results(chunk_kda_gated, False), results(chunk_kda_gated, True)
    for x, y, z in zip(found, low, exact, strict=True):
        assert_close(x, y, z, BF16)
