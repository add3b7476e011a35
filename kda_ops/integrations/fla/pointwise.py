"""Gate and norms by flash-linear-attention's names."""

from typing import Any

import torch
from torch import Tensor

from kda_ops._numerics import accumulation_dtype
from kda_ops.gating.chunk_cumsum import chunk_cumsum
from kda_ops.gating.gate import gate
from kda_ops.integrations.fla.refusals import check_names, check_offered
from kda_ops.norm.l2norm import l2norm as normalized
from kda_ops.norm.rms_norm_gated import rms_norm_gated


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fla.ops.kda.gate.fused_kda_gate`.

    Args:
        g: `[..., HV, K]`, the gate's input.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        output_dtype: The dtype of the result.

    Returns:
        `[..., HV, K]` in nats.

    Raises:
        ValueError: What `kda_ops.gate` refuses.
    """
    return gate(g, A_log, dt_bias, lower_bound=lower_bound).to(output_dtype)


def kda_gate_chunk_cumsum(
    g: Tensor,
    A_log: Tensor | None,
    chunk_size: int,
    scale: float | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float,
    chunk_indices: Tensor | None = None,
    lower_bound: float | None = None,
    use_graph: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`fla.ops.kda.gate.kda_gate_chunk_cumsum`; unlike FLA's it has a gradient.

    Args:
        g: `[B, T, HV, K]`, the gate's input.
        A_log: `[HV]`.
        chunk_size: 64.
        scale: Scale of the result, which is in nats without one.
        dt_bias: `[HV * K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        output_dtype: The dtype of the result, that of g if None.
        chunk_indices: Ignored: FLA's table has another size.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        use_graph: Ignored.
        **kwargs: None are known.

    Returns:
        `[B, T, HV, K]`.

    Raises:
        ValueError: Another chunk size, or what the operators refuse.
        TypeError: An argument that is not known.
    """
    check_names(kwargs)
    check_offered(chunk_size=chunk_size)
    nats = gate(g, A_log, dt_bias, lower_bound=lower_bound)
    sums = chunk_cumsum(nats, scale=1.0 if scale is None else scale, cu_seqlens=cu_seqlens)
    return sums.to(g.dtype if output_dtype is None else output_dtype)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`fla.modules.norm.l2norm.l2norm`.

    Args:
        x: `[..., K]`.
        eps: Added to the sum of squares.
        output_dtype: The dtype of the result, that of x if None.

    Returns:
        `[..., K]`.
    """
    dtype = x.dtype if output_dtype is None else output_dtype
    return normalized(x.to(torch.promote_types(x.dtype, dtype)), eps=eps).to(dtype)


def fused_rms_norm_gated_forward(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fla.modules.FusedRMSNormGated.forward`, with a SiLU or a sigmoid.

    Args:
        self: The module.
        x: `[..., V]`.
        g: `[..., V]`, the output gate before its activation.
        residual: `[..., V]`, added to x before the norm.
        prenorm: Whether to return the sum too.
        residual_in_fp32: Whether the sum is fp32 without a residual.

    Returns:
        `[..., V]` in the dtype of x, with `prenorm` also the sum in the dtype of the residual.
    """
    dtype = accumulation_dtype(x)
    total = x if residual is None else x.to(dtype) + residual.to(dtype)
    silu = self.activation != "sigmoid"
    weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
    # the product of a SiLU is not rounded before its last factor
    y = rms_norm_gated(total.to(dtype) if silu else total, g, weight, eps=self.eps)
    y = (y * g.to(dtype) if silu else y).to(x.dtype)
    if not prenorm:
        return y
    kept = torch.float32 if residual_in_fp32 else x.dtype
    return y, total.to(kept if residual is None else residual.dtype)
