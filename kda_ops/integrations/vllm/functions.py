"""vLLM's two fused functions."""

from torch import Tensor

from kda_ops._numerics import CHUNK, QK_NORM_EPS
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.norm.l2norm import l2norm

SAFE_GATE_BOUND = -5.0


def fused_kda_gate_chunk_cumsum(
    raw_g: Tensor,
    A_log: Tensor,
    g_bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    chunk_size: int = CHUNK,
    safe_gate: bool | None = None,
    lower_bound: float | None = None,
) -> Tensor:
    """`kda_ops.gate_cumsum`: the cumulative gate of each chunk, in **log2**.

    Args:
        raw_g: `[B, T, HV, K]`.
        A_log: HV numbers in any shape, as checkpoints have them.
        g_bias: `[HV, K]` or `[HV * K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences.
        chunk_indices: vLLM's `chunk_indices`, but of `kda_ops.varlen.prepare_chunk_indices`, which
            has a static shape; made here if None.
        chunk_size: Tokens.
        safe_gate: Whether the gate is bounded; None means that it is if `lower_bound` is given.
        lower_bound: In nats; -5 for a safe gate without one. Ignored if `safe_gate` is False.

    Returns:
        G, `[B, T, HV, K]`, fp32.

    Raises:
        ValueError: As `gate_cumsum`.
    """
    return gate_cumsum(
        raw_g,
        A_log.reshape(-1),
        g_bias,
        lower_bound=_gate_bound(safe_gate, lower_bound),
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )


def chunk_kda_with_fused_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_g: Tensor,
    beta: Tensor | None = None,
    A_log: Tensor | None = None,
    g_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    raw_beta: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    safe_gate: bool | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Chunked KDA from the raw gate: `chunk_kda_gated`, or `gate_cumsum` and `chunk_kda`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        raw_g: `[B, T, HV, K]`, the gate's input.
        beta: `[B, T, HV]` after its sigmoid, or None with `raw_beta`.
        A_log: HV numbers in any shape.
        g_bias: `[HV, K]` or `[HV * K]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, V, K]`; zeros if None.
        output_final_state: Whether to return the last state.
        use_qk_l2norm_in_kernel: Whether q and k are still to be normalised.
        cu_seqlens: `[N + 1]`, offsets of sequences.
        raw_beta: `[B, T, HV]` before its sigmoid: then one operator does all of it.
        chunk_indices: As `fused_kda_gate_chunk_cumsum`.
        safe_gate: Likewise.
        lower_bound: Likewise.

    Returns:
        `o [B, T, HV, V]` and the final state `[N, HV, V, K]` or None.

    Raises:
        ValueError: None or both of `beta` and `raw_beta`, and as the operators.
    """
    if (beta is None) == (raw_beta is None):
        given = "none" if beta is None else "both"
        raise ValueError(f"one of beta and raw_beta must be given, got {given}")
    A_log = None if A_log is None else A_log.reshape(-1)
    bound = _gate_bound(safe_gate, lower_bound)
    if raw_beta is not None:
        return chunk_kda_gated(
            q,
            k,
            v,
            raw_g,
            raw_beta,
            A_log,
            g_bias,
            lower_bound=bound,
            qk_norm_eps=QK_NORM_EPS if use_qk_l2norm_in_kernel else None,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, eps=QK_NORM_EPS), l2norm(k, eps=QK_NORM_EPS)
    g_cumsum = gate_cumsum(
        raw_g, A_log, g_bias, lower_bound=bound, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    return chunk_kda(
        q,
        k,
        v,
        g_cumsum,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )


def _gate_bound(safe_gate: bool | None, lower_bound: float | None) -> float | None:
    if safe_gate is None:
        return lower_bound
    if not safe_gate:
        return None
    return SAFE_GATE_BOUND if lower_bound is None else lower_bound
