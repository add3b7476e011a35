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
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.fused import chunk_kda_gated
from kda_ops.nn import ContextParallel, context_chunk_kda, context_scan
from tests.support.backward import launch
from tests.support.context_ranks import SCENARIOS
from tests.support.fake_cuda import cuda_code, summary
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


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_autocast_does_not_round_states(one_rank: ContextParallel, compile: bool) -> None:
    """Nor their gradients: all that a call under it computes are the numbers of one without."""
    inputs = chunk_kda_gated_inputs(
        torch.device("cpu"), T=256, H=2, K=16, V=16, gate="slow", norm=True, dtype=torch.float32
    )

    def results(enabled: bool) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items() if torch.is_tensor(x)}
        rest = {n: x for n, x in inputs.items() if n not in leaves}

        def step(**x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return context_chunk_kda(one_rank, **x, **rest)[0]

        call = torch.compile(step, backend="aot_eager", fullgraph=True) if compile else step
        o = call(**leaves)
        # a graph of this backend takes what is around its call
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and not compile):
            return [o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))]

    for x, y in zip(results(True), results(False), strict=True):
        assert torch.equal(x, y)


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


def test_compiled_for_a_gpu(one_rank: ContextParallel) -> None:
    """Forward the chunks are prepared and scanned once, and what is read of the state is one GEMM,
    without a copy of its operands; backward another one, beside the gradient of the recurrence.
    """
    context = ContextParallel(one_rank.mesh, "contiguous")
    inputs = chunk_kda_gated_inputs(torch.device("cpu"), T=256, H=32, norm=True)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if isinstance(x, Tensor)}
    rest = {n: x for n, x in inputs.items() if n not in leaves}
    _, codes = cuda_code(
        lambda **x: context_chunk_kda(context, **x, **rest)[0], **leaves, backward=True
    )
    forward, backward = map(summary, codes)
    own = ["chunk_gated_prepare_kernel", "chunk_scan_affine_kernel"]
    assert forward.launches[:2] == own
    fused = [name for name in forward.launches if name.startswith("triton_")]
    assert len(fused) == len(forward.launches) - 2 <= 3  # maps, states, the sum of outputs
    assert backward.launches.count("backward_prepare_kernel") == 1
    for code in (forward, backward):
        assert code.externs.count("extern_kernels.bmm") == 1
        assert sum("all_gather" in call for call in code.externs) == 1
