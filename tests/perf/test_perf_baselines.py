"""How baselines are called, with fakes of their packages that use our references."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.conv.short_conv_qkv.cases import _case as conv_case
from perf.baselines import fla, others
from perf.bench_core import core, core_case
from perf.harness import rows

CPU = torch.device("cpu")


def module(name: str, **contents: Any) -> ModuleType:
    found = ModuleType(name)
    found.__dict__.update(contents)
    return found


def chunks_from_gates(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`g` in nats."""
    batch = {"cu_seqlens": options.get("cu_seqlens")}
    G = kda_ops.chunk_cumsum(g, scale=kda_ops._numerics.RCP_LN2, **batch)
    return kda_ops.chunk_kda(q, k, v, G, beta, output_final_state=True, **batch)


def their_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
    assert options["use_qk_l2norm_in_kernel"]
    o, state = chunks_from_gates(kda_ops.l2norm(q), kda_ops.l2norm(k), v, g, beta)
    return o, state.transpose(-1, -2)


def decorated(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("kernels from a hub would be measured, not the path without them")


decorated.__wrapped__ = their_chunks  # type: ignore[attr-defined]


def bounded_gate(x: Tensor, A_log: Tensor, dt_bias: Tensor, *, lower_bound: float) -> Tensor:
    return kda_ops.gate(x, A_log, dt_bias, lower_bound=lower_bound)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    """FLA's convolution; its state holds W inputs a channel, the newest last."""
    state = options["initial_state"]
    arguments: dict[str, Any] = {name: options[name] for name in ("activation", "cu_seqlens")}
    if state is not None:
        past = state[:, :, 1:].transpose(1, 2)
        arguments |= {
            "conv_state": torch.cat([torch.zeros_like(past[:1]), past]),
            "state_indices": torch.arange(1, len(past) + 1),
            "has_initial_state": torch.ones(len(past), dtype=torch.bool),
            "layout": "SD",
        }
    assert x.is_contiguous()
    return kda_ops.short_conv(x, weight, bias, **arguments), None


def normed(x: Tensor, eps: float) -> tuple[Tensor, None]:
    x.view(-1, x.shape[-1])  # refuses slices of a packed result, as FLA's does
    return kda_ops.l2norm(x, eps=eps), None


def fla_core(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    assert options["safe_gate"] == (options["lower_bound"] is not None)
    gate = {name: options[name] for name in ("A_log", "dt_bias", "lower_bound")}
    batch = {} if options["cu_seqlens"] is None else {"cu_seqlens": options["cu_seqlens"]}
    return core(q, k, v, x, beta, **gate, **batch)


STAND_INS = {
    "attn_gym.linear.kda": {"bound_gate": bounded_gate, "chunk_kda": chunks_from_gates},
    "transformers.models.kimi_linear.modeling_kimi_linear": {
        "chunk_kimi_delta_attention": decorated
    },
    "fla.ops.kda": {"chunk_kda": fla_core},
    "fla.ops.utils.index": {"prepare_chunk_indices": lambda *arguments: None},
    "fla.modules.causal_conv1d": {"causal_conv1d": convolved},
    "fla.modules.norm.l2norm": {"l2norm_fwd": normed},
}


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    made: dict[str, ModuleType] = {}
    for name, contents in STAND_INS.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            made.setdefault(parent, module(parent))
        made[name] = module(name, **contents)
        if len(parts) > 1:
            setattr(made[".".join(parts[:-1])], parts[-1], made[name])
    with mock.patch.dict(sys.modules, made):
        yield


def check(baseline: Any, case: Any, stage: str, function: Any) -> None:
    (row, _) = rows.function_rows(
        stage, case, function, baselines={"baseline": baseline}, compile_too=False
    )
    assert rows.check(row, CPU) <= rows.AGREEMENT


@pytest.mark.parametrize("lengths", [(130,), (70, 60)], ids=["whole", "ragged"])
@pytest.mark.parametrize(("name", "bound"), [("softplus", None), ("bounded", -5.0)])
def test_flas_core(name: str, bound: float | None, lengths: tuple[int, ...]) -> None:
    check(fla.fla_core, core_case(name, lengths, 2, bound), "core", core)


@pytest.mark.parametrize("lengths", [(130,), (70, 60)], ids=["whole", "ragged"])
def test_attention_gyms_core(lengths: tuple[int, ...]) -> None:
    check(others.gym_core, core_case("bounded", lengths, 2, -5.0), "core", core)
    assert others.gym_core(core_case("softplus", lengths, 2, None)) is None


def test_transformers_core() -> None:
    check(others.transformers_core, core_case("softplus", (130,), 2, None), "core", core)
    for case in (
        core_case("softplus-T8192-H32", (8192,), 32, None),
        core_case("bounded", (64,), 2, -5.0),
    ):
        assert others.transformers_core(case) is None


CONVOLUTIONS = [
    conv_case("dense", 2, 19, 3, 128, 520),
    conv_case(
        "SD", 3, 8, 2, 64, 72, layout="SD", state_indices=(3, 1, 2), initial=(1, 0, 1), bias=True
    ),
    conv_case(
        *("DS", 1, 40, 2, 64, 96),
        lengths=(10, 20, 10),
        layout="DS",
        state_indices=(3, 1, 2),
        initial=(1, 0, 1),
    ),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_flas_convolutions_of_q_k_and_v(case: Any) -> None:
    check(fla.fla_short_conv_qkv, case, "short_conv_qkv", kda_ops.fused.short_conv_qkv)


def test_only_installed_packages_are_baselines() -> None:
    versions: dict[str, str | None] = {"attn-gym": "0.0.17", "transformers": "5.17.0"}
    with mock.patch.object(others, "version", versions.get):
        assert list(others.more_baselines()) == ["transformers 5.17.0, no kernels"]
    with mock.patch.object(others, "version", (versions | {"nvidia-cutlass-dsl": "1"}).get):
        assert len(others.more_baselines()) == 2
