"""Common to all graph rewrites: their log, the user's own passes, graphs they leave alone."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import kda_ops
from tests.lowering.test_fusion_decode import Step, compiled, variant
from tests.support.fake_cuda import REINDEXES, cuda_code, summary
from tests.support.rewritten import rewritten

H, K, V = 2, 64, 64


def chunked(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Tensor:
    G = kda_ops.gate_cumsum(x, A_log)
    o, _ = kda_ops.chunk_kda(q, k, v, G, torch.sigmoid(beta.float()))
    return o


def inputs(T: int = 100) -> list[Tensor]:
    heads = [torch.randn(1, T, H, K, dtype=torch.bfloat16) for _ in range(4)]
    q, k = (torch.nn.functional.normalize(y.float(), dim=-1).bfloat16() for y in heads[:2])
    return [q, k, *heads[2:], torch.randn(1, T, H, dtype=torch.bfloat16), torch.randn(H)]


def test_the_log_says_what_fired_and_what_it_saves() -> None:
    from kda_ops.lowering.rewrites.framework import recording

    with recording() as outcomes:
        cuda_code(chunked, *inputs())
    (outcome,) = outcomes
    assert outcome.rewrite == "chunk_kda_gated"
    assert outcome.reason is None
    assert outcome.removed == ("kda_ops.gate_cumsum.default", "kda_ops.chunk_kda.default")
    assert outcome.bytes_saved == 2 * 4 * 100 * H * K  # G in fp32, written and read
    with recording() as later:
        pass
    assert later == []


def test_the_logger_says_what_did_not_fire(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="kda_ops.lowering"):
        compiled(variant(norm_eps=(1e-6, 1e-5)))
        compiled(Step())
    lines = [(record.levelname, record.message) for record in caplog.records]
    lines = [line for line in lines if "kda_decode" in line[1]]
    assert [level for level, _ in lines] == ["DEBUG", "INFO"]
    assert "kda_decode did not fire at" in lines[0][1]
    assert "q and k have different eps" in lines[0][1]
    assert "kda_decode fired at" in lines[1][1]


SLOTS = {  # and what the user's pass finds there: our small operators, or what became of them
    "joint_custom_pre_pass": "chunk_kda",
    "joint_custom_post_pass": "chunk_kda",
    "post_grad_custom_pre_pass": "chunk_kda",
    "post_grad_custom_post_pass": "chunk_kda_gated",
}


def test_the_users_own_passes_run_beside_them() -> None:
    """In every pass slot, none of which is ours."""
    seen: dict[str, list[str]] = {}

    def own_pass(slot: str) -> Callable[[torch.fx.Graph], None]:
        def note(graph: torch.fx.Graph) -> None:
            seen[slot] = [str(node.target) for node in graph.nodes]

        return note

    options = {slot: own_pass(slot) for slot in SLOTS}
    _, (source,) = cuda_code(chunked, *inputs(), options=options)
    assert "chunk_gated_prepare_kernel" in summary(source).launches
    for slot, operator in SLOTS.items():
        assert f"kda_ops.{operator}.default" in seen[slot], slot


def test_they_are_installed_once_and_only_touch_our_graphs() -> None:
    compiled(Step())
    from torch._inductor.fx_passes.post_grad import pass_patterns

    from kda_ops.lowering.rewrites import framework

    framework.install_rewrites()
    (ours,) = [patterns for patterns in pass_patterns if isinstance(patterns, framework.Rewrites)]
    steps: list[Any] = []

    def step(graph: torch.fx.Graph) -> list[Any]:
        steps.append(graph)
        return []

    framework.POST_GRAD.append(step)  # type: ignore[arg-type]
    try:
        other = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
        ours.apply(other)
        assert steps == []
        ours.apply(torch.fx.symbolic_trace(lambda x: torch.ops.kda_ops.l2norm.default(x, 1e-6)))
        assert len(steps) == 1
    finally:
        framework.POST_GRAD.pop()


def test_norms_of_other_things_stay() -> None:
    """Those of a model's hidden states, next to a layer."""

    def model(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rms = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * y * torch.sigmoid(x)
        unit = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-5) * y
        decayed = -torch.exp(y) * torch.nn.functional.softplus(x)
        return rms, unit, decayed, kda_ops.l2norm(x.exp())

    found = rewritten(model, torch.randn(3, 8), torch.randn(8))
    assert found.operators == ["l2norm"]
    assert found.fired == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_norm_after_the_scan_is_one_kernel_with_what_follows(dynamic: bool) -> None:
    """With surrounding casts and reshapes, as an operator and in plain PyTorch."""

    def operator(*args: Tensor) -> Tensor:
        *heads, z, weight = args
        return kda_ops.rms_norm_gated(chunked(*heads), z, weight).flatten(2).half() * 2

    def plain(*args: Tensor) -> Tensor:
        *heads, z, weight = args
        x = chunked(*heads).float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
        return (x * torch.sigmoid(z.float())).bfloat16().flatten(2).half() * 2

    def quantised(*args: Tensor) -> Tensor:
        *heads, z, weight = args
        y = kda_ops.rms_norm_gated(chunked(*heads), z, weight).flatten(2).float()
        return (y * 40).round().clamp(-128, 127).to(torch.int8)

    def quantised_per_head(*args: Tensor) -> tuple[Tensor, Tensor]:
        *heads, z, weight = args
        y = kda_ops.rms_norm_gated(chunked(*heads), z, weight).float()
        scale = y.abs().amax(-1, keepdim=True) / 448
        return (y / scale).to(torch.float8_e4m3fn).flatten(2), scale

    z, weight = torch.randn(1, 100, H, V, dtype=torch.bfloat16), torch.randn(V)
    for function in (operator, plain, quantised, quantised_per_head):
        _, (source,) = cuda_code(function, *inputs(), z, weight, dynamic=dynamic)
        prepare, scan, norm, *rest = summary(source).launches
        assert [prepare, scan] == ["chunk_gated_prepare_kernel", "chunk_scan_kernel"]
        assert norm.startswith("triton_per_fused")
        assert len(rest) == (0 if REINDEXES or function is quantised_per_head else 1)
