"""Chunked KDA as an affine function: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import (
    check_chunk_states,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_varlen,
    rates_of,
)
from kda_ops._numerics import CHUNK
from kda_ops._registry import define_op, selected
from kda_ops._roles import CHUNKS, OFFSETS
from kda_ops.delta_rule.chunk_kda_gated_affine.reference import chunk_kda_gated_affine_reference
from kda_ops.delta_rule.chunked.checks import RAW_INPUTS, check_chunk_values, check_raw_inputs
from kda_ops.delta_rule.chunked.states import chunked_affine_fake
from kda_ops.native import define_native
from kda_ops.varlen import prepare_chunk_indices

chunk_kda_gated_affine_op = define_op(
    f"chunk_kda_gated_affine({RAW_INPUTS}, Tensor? initial_state, Tensor? entered, "
    "Tensor? cu_seqlens, Tensor? chunk_indices) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=chunk_kda_gated_affine_reference,
    fake=chunked_affine_fake,
    cuda="kda_ops.delta_rule.chunk_kda_gated_affine.kernel:launch_chunk_kda_gated_affine",
    roles={"cu_seqlens": OFFSETS, "chunk_indices": CHUNKS},
    check_values=check_chunk_values,
)
define_native(chunk_kda_gated_affine_op, "kda_ops.delta_rule.chunked.native:chunk_kda_gated_affine")


def chunk_kda_gated_affine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_gate: Tensor,
    raw_beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    *,
    lower_bound: float | None = None,
    beta_scale: float = 1.0,
    qk_norm_eps: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    entered: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunk_kda_gated` of parts of sequences, before the states that enter them are known.

    The recurrence is affine in the state S `[V, K]` before its first token: its output is `o + S
    reads` (of token t `o[t] + S @ reads[t]`), its final state `S @ transition + final_state`. One
    pass over the tokens makes all four, from K columns of the state more than `chunk_kda_gated`
    has. No entry of `transition` is above 1 with normalized keys and betas of at most 2, for any
    gate. Source: Kimi Linear (arXiv:2510.26692), section 3.

    On a GPU its gradient is the vector-Jacobian product of the definition: `context_chunk_kda`,
    which calls it, has a backward of its own.

    Args:
        q: `[B, T, H, K]`, as all arguments up to `scale` as in `chunk_kda_gated`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        raw_gate: `[B, T, HV, K]`, the input of the gate (which is in nats).
        raw_beta: `[B, T, HV]` before its sigmoid.
        A_log: `[HV]` or `[1, 1, HV, 1]`, natural log of the decay rate, or None.
        dt_bias: `[HV, K]` or `[HV * K]`, or None.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        beta_scale: 1 or 2.
        qk_norm_eps: None if q and k are already normalized.
        scale: Scale of `o` and `reads`, `K ** -0.5` if None.
        initial_state: `[N, HV, V, K]`, bf16 or fp32 (fp64 on the CPU): states that are known
            already, to which those that enter are added; zeros if None.
        entered: `[N]`, bool: the sequences that a state enters; `reads` and `transition` of all
            others are 0. All if None.
        cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences in T (then B is 1). Without
            it every batch row is a sequence, `N = B`.
        chunk_indices: The batch's chunk table, `kda_ops.varlen.prepare_chunk_indices(cu_seqlens,
            T)`; computed if None.

    Returns:
        `(o, reads, final_state, transition)`: `o [B, T, HV, V]` and `reads [B, T, HV, K]` in the
        dtype of v, rows past the last sequence zero; `final_state [N, HV, V, K]` and `transition
        [N, HV, K, K]` in fp32 (fp64 with fp64 q).

    Raises:
        ValueError: An invalid shape, dtype, device or combination of arguments; on the CPU also
            offsets or chunks with wrong values.
    """
    check_raw_inputs(
        q, k, v, raw_gate, raw_beta, A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps
    )
    check_varlen("q", q, cu_seqlens, chunk_indices, CHUNK)
    check_chunk_states(q, v, initial_state, True, None, None, None, cu_seqlens, "VK")
    if entered is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape("entered", entered, (sequences,))
        check_dtype("entered", entered, (torch.bool,))
        check_device(q=q, entered=entered)
    if scale is None:
        scale = q.shape[3] ** -0.5
    check_number("scale", scale)
    if cu_seqlens is not None and chunk_indices is None:
        chunk_indices = prepare_chunk_indices(cu_seqlens, q.shape[1])
    o, reads, final_state, transition = selected(chunk_kda_gated_affine_op)(
        q, k, v, raw_gate, raw_beta, rates_of(A_log), dt_bias, lower_bound, beta_scale,
        qk_norm_eps, scale, initial_state, entered, cu_seqlens, chunk_indices,
    )  # fmt: skip
    return o, reads, final_state, transition
