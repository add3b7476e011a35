"""The KDA gate: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import check_gate_parameters, rates_of
from kda_ops._numerics import accumulation_dtype
from kda_ops._registry import define_op, selected
from kda_ops.gating.gate.reference import gate_reference


def gate_fake(raw_gate: Tensor) -> Tensor:
    return torch.empty(raw_gate.shape, dtype=accumulation_dtype(raw_gate), device=raw_gate.device)


gate_op = define_op(
    "gate(Tensor raw_gate, Tensor? A_log, Tensor? dt_bias, float? lower_bound) -> Tensor",
    reference=gate_reference,
    fake=gate_fake,
    cuda="kda_ops.gating.gate.kernel:launch_gate",
)


def gate(
    raw_gate: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    *,
    lower_bound: float | None = None,
) -> Tensor:
    """The per-channel log decay of Kimi Delta Attention, in nats.

    With `a = exp(A_log[h])` and `z = raw_gate + dt_bias`:

    * without a bound, `g = -a * softplus(z)`, exact for very negative z and linear for z > 20;
    * with `lower_bound`, `g = lower_bound * sigmoid(a * z)`.

    Finite inputs give no NaN. Rates outside [e^-87, e^88] (in fp64 [e^-708, e^709]) are clamped to
    it; g is -inf, a decay of 0, where it overflows. Gradients are 0 through clamped rates, where g
    is below -2^64, and for z with a bound where a is above 2^64.

    Source: Kimi Linear (arXiv:2510.26692), section 3; the bounded form is that of Kimi K3 and
    GLM-5-Next.

    Args:
        raw_gate: `[..., HV, K]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides.
        A_log: `[HV]` or `[1, 1, HV, 1]`, natural log of the decay rate. None means `a = 1` and
            needs `lower_bound`.
        dt_bias: `[HV, K]` or `[HV * K]`, added to raw_gate.
        lower_bound: None, or a bound in `[-5, 0)` in nats.

    Returns:
        `[..., HV, K]` in **nats**, fp32 (fp64 for fp64 inputs), contiguous.

    Raises:
        ValueError: An invalid shape, dtype, device or `lower_bound`.
    """
    check_gate_parameters(raw_gate, A_log, dt_bias, lower_bound)
    return selected(gate_op)(raw_gate, rates_of(A_log), dt_bias, lower_bound)
