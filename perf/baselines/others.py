"""Baselines other than FLA, if installed: attention-gym, and transformers without kernels. The
functions are like those of `perf.baselines.fla`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from kda_ops._cases import Case
from kda_ops._numerics import CHUNK
from perf.harness.machine import version
from perf.harness.rows import Call, Inputs, Prepare

LONGEST = 1024  # tokens: transformers without kernels keeps [T / 64, H, 64, 64, K] fp32 tiles


def more_baselines() -> dict[str, Any]:
    """The installed baselines of the core, by their names in reports."""
    found: dict[str, Any] = {}
    gym, kernels = version("attn-gym"), version("nvidia-cutlass-dsl")
    if gym is not None and kernels is not None:
        found[f"attention-gym {gym}"] = gym_core
    transformers = version("transformers")
    if transformers is not None:
        found[f"transformers {transformers}, no kernels"] = transformers_core
    return found


def gym_core(case: Case) -> Prepare | None:
    """attention-gym's gate and chunks; the norms are PyTorch's. Bounded gates only: it needs decays
    above e^-5.9.
    """
    if "bounded" not in case.name:
        return None

    def prepare(inputs: Inputs) -> Call:
        from attn_gym.linear.kda import bound_gate, chunk_kda

        q, k, v, x, beta = (inputs[name] for name in ("q", "k", "v", "raw_gate", "raw_beta"))
        gate = {name: inputs[name] for name in ("A_log", "dt_bias", "lower_bound")}

        def call() -> tuple[Tensor, Tensor]:
            normed = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
            g = bound_gate(x, **gate)
            return chunk_kda(
                *normed,
                v,
                g,
                beta.sigmoid(),
                cu_seqlens=inputs.get("cu_seqlens"),
                output_final_state=True,
            )

        return call

    return prepare


def transformers_core(case: Case) -> Prepare | None:
    """The gate and chunks of transformers' Kimi-Linear in eager PyTorch, short inputs only."""
    if case.bytes_moved > LONGEST * 32 * 128 * 16 or "softplus" not in case.name:
        return None

    def prepare(inputs: Inputs) -> Call:
        from transformers.models.kimi_linear import modeling_kimi_linear as kimi

        chunks = inspect.unwrap(kimi.chunk_kimi_delta_attention)
        q, k, v, x, beta = (inputs[name] for name in ("q", "k", "v", "raw_gate", "raw_beta"))
        rate, bias = inputs["A_log"].exp()[:, None], inputs["dt_bias"]

        def call() -> tuple[Tensor, Tensor]:
            z = x.float() + bias
            g = -rate * torch.where(z > 20.0, z, torch.log(1.0 + torch.exp(z)))
            o, state = chunks(
                *(q, k, v, g, beta.sigmoid()),
                chunk_size=CHUNK,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            return o, state.transpose(-1, -2)  # K first

        return call

    return prepare
