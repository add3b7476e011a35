"""The core from raw projections, forward plus backward and backward alone, against FLA: gradients
of q, k, v, the gate's input and parameters, and beta.

There is no row for the eager references: their gradient takes 60 times as long. `peak_MB` includes
arguments and results.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.delta_rule.chunk_kda_gated.backward import launch_chunk_kda_gated_backward
from perf.bench_core import core_inputs
from perf.harness.rows import OURS, Call, Inputs, Row

NAMES = ("q", "k", "v", "raw_gate", "raw_beta", "A_log", "dt_bias")
D = 128
CASES: dict[str, tuple[tuple[int, ...], int, float | None]] = {
    "softplus-T8192-H32": ((8192,), 32, None),
    "softplus-T4096-H16": ((4096,), 16, None),
    "softplus-T2048-H32": ((2048,), 32, None),
    "softplus-T8192-H8": ((8192,), 8, None),
    "bounded-T8192-H64": ((8192,), 64, -5.0),
    "softplus-8x1024-H32": ((1024,) * 8, 32, None),
}


def with_gradient(inputs: Inputs) -> Inputs:
    """The inputs of the core, and the gradient of its output."""
    return inputs | {"do": torch.randn_like(inputs["v"])}


def ours(forward: bool) -> Callable[[Inputs], Call]:
    operator = torch.ops.kda_ops.chunk_kda_gated.default
    names = [x.name for x in operator._schema.arguments]
    constants = {"beta_scale": 1.0, "qk_norm_eps": 1e-6, "scale": D**-0.5}
    needs = [name in NAMES for name in names]

    def prepare(inputs: Inputs) -> Call:
        given = inputs | constants | {"output_final_state": False}
        arguments = [given.get(name) for name in names]

        def call() -> Any:
            o = operator(*arguments)[0] if forward else None
            found = launch_chunk_kda_gated_backward(*arguments, [inputs["do"], None], needs)
            return o, found

        return call

    return prepare


def fla(forward: bool) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda import chunk_kda

        leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
        lower_bound = inputs["lower_bound"]

        def output() -> Tensor:
            q, k, v, x, beta, A_log, dt_bias = leaves
            o: Tensor = chunk_kda(
                q,
                k,
                v,
                x,
                beta,
                A_log=A_log,
                dt_bias=dt_bias.reshape(-1),
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                safe_gate=lower_bound is not None,
                lower_bound=lower_bound,
                cu_seqlens=inputs.get("cu_seqlens"),
            )[0]
            return o

        with torch.enable_grad():
            kept = None if forward else output()

        def call() -> Any:
            with torch.enable_grad():
                o = output() if kept is None else kept
                return o, torch.autograd.grad(o, leaves, inputs["do"], retain_graph=not forward)

        return call

    return prepare


def rows() -> list[Row]:
    found = []
    for name, (lengths, H, lower_bound) in CASES.items():
        n = 2 * sum(lengths) * H * D  # bytes of one tensor
        for stage, forward in (("core backward", False), ("core training", True)):
            for provider, side in (("FLA 0.6", fla), (OURS, ours)):
                row = Row(
                    stage=stage,
                    case=name,
                    provider=provider,
                    make=lambda device, sizes=(lengths, H, lower_bound): with_gradient(
                        core_inputs(device, *sizes)
                    ),
                    prepare=side(forward),
                    expected=None,
                    # q, k, v, the gate's input, do and four gradients; forward four of them and o
                    bytes_moved=(14 if forward else 9) * n,
                    graph=False,
                )
                found.append(row)
    return found


@pytest.mark.parametrize("row", rows(), ids=str)
def bench_backward(row: Row, measure: Callable[[Row], None], benchmark: Any) -> None:
    if row.provider != OURS:
        pytest.importorskip("fla")
    measure(row)
    call = row.prepare(row.make(torch.device("cuda")))
    torch.cuda.reset_peak_memory_stats()
    call()
    benchmark.extra_info["peak_MB"] = round(torch.cuda.max_memory_allocated() * 1e-6)
