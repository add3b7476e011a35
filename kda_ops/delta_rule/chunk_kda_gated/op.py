"""Chunked KDA from raw inputs: schemas, fake implementations, public function."""

from torch import Tensor

from kda_ops._checks import check_chunk_states, check_number, check_varlen, rates_of
from kda_ops._numerics import CHUNK
from kda_ops._registry import define_op, selected
from kda_ops._roles import BLOCKS, CHUNKS, CONTEXTS, OFFSETS, SLOTS, STATE_PAGES
from kda_ops._saving import SavingForward
from kda_ops.blocks import BLOCK_ARGUMENTS, check_blocks
from kda_ops.delta_rule.chunk_kda_gated.reference import (
    chunk_kda_gated_reference,
    chunk_kda_gated_state_reference,
)
from kda_ops.delta_rule.chunked.checks import (
    RAW_INPUTS,
    check_chunk_state_values,
    check_chunk_values,
    check_raw_inputs,
)
from kda_ops.delta_rule.chunked.gradient_workspace import Saved, saved_fake, saved_size
from kda_ops.delta_rule.chunked.states import chunked_fake, chunked_state_fake
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.native import define_native
from kda_ops.varlen import prepare_chunk_indices

chunk_kda_gated_op = define_op(
    f"chunk_kda_gated({RAW_INPUTS}, Tensor? initial_state, bool output_final_state, "
    "Tensor? cu_seqlens, Tensor? chunk_indices) -> (Tensor, Tensor)",
    reference=chunk_kda_gated_reference,
    fake=chunked_fake,
    cuda="kda_ops.delta_rule.chunk_kda_gated.kernel:launch_chunk_kda_gated",
    roles={"cu_seqlens": OFFSETS, "chunk_indices": CHUNKS},
    cuda_backward="kda_ops.delta_rule.chunk_kda_gated.backward:launch_chunk_kda_gated_backward",
    saving=SavingForward(
        Saved._fields,
        "kda_ops.delta_rule.chunk_kda_gated.backward:launch_chunk_kda_gated_saving",
        "kda_ops.delta_rule.chunk_kda_gated.backward:launch_chunk_kda_gated_backward",
        fake=saved_fake,
        size=saved_size,
        kept=("o",),
    ),
    check_values=check_chunk_values,
)

chunk_kda_gated_state_op = define_op(
    f"chunk_kda_gated.state({RAW_INPUTS}, Tensor(a!) state, Tensor? state_indices, "
    "Tensor? has_initial_state, Tensor? cu_seqlens, Tensor? chunk_indices, str state_layout, "
    f"{BLOCK_ARGUMENTS}) -> Tensor",
    reference=chunk_kda_gated_state_reference,
    fake=chunked_state_fake,
    cuda="kda_ops.delta_rule.chunk_kda_gated.kernel:launch_chunk_kda_gated_state",
    roles={
        "state": STATE_PAGES,
        "state_indices": SLOTS,
        "cu_seqlens": OFFSETS,
        "chunk_indices": CHUNKS,
        "block_table": BLOCKS,
        "context_lens": CONTEXTS,
    },
    check_values=check_chunk_state_values,
)
define_native(chunk_kda_gated_op, "kda_ops.delta_rule.chunked.native:chunk_kda_gated")
define_native(chunk_kda_gated_state_op, "kda_ops.delta_rule.chunked.native:chunk_kda_gated_state")


def chunk_kda_gated(
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
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    state: Tensor | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    state_layout: str = "VK",
    block_table: Tensor | None = None,
    context_lens: Tensor | None = None,
    block_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over whole sequences from the raw gate and the raw beta.

    Equals `chunk_kda(q, k, v, gate_cumsum(raw_gate, A_log, dt_bias, lower_bound=lower_bound),
    beta_scale * sigmoid(raw_beta))`, with `l2norm(q, eps=qk_norm_eps)` and `l2norm(k,
    eps=qk_norm_eps)` if `qk_norm_eps` is given, without rounding in between and without a
    cumulative gate in memory. See `chunk_kda` for the recurrence and `gate` for the gate. A token
    may decay to 0 (also through a raw_gate of inf): it forgets the state, and gates near it keep
    their digits. Source: Kimi Linear (arXiv:2510.26692), sections 3 and 4.

    Args:
        q: `[B, T, H, K]`, fp16, bf16 or fp32 (fp64 on the CPU), any strides (copied if the last one
            is not 1). Already normalized, or with `qk_norm_eps` before its norm.
        k: `[B, T, H, K]`, dtype of q; likewise.
        v: `[B, T, HV, V]`, dtype of q, `HV % H == 0`: value head i uses key head `i // (HV // H)`.
        raw_gate: `[B, T, HV, K]`, any floating dtype, the input of the gate (which is in nats).
        raw_beta: `[B, T, HV]` before its sigmoid, any floating dtype.
        A_log: `[HV]` or `[1, 1, HV, 1]`, natural log of the decay rate. None means a rate of 1 and
            needs `lower_bound`.
        dt_bias: `[HV, K]` or `[HV * K]`, added to raw_gate.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        beta_scale: 1, or 2 for eigenvalues down to -1.
        qk_norm_eps: None if q and k are already normalized; else they are normalized with this eps
            under the root.
        scale: Scale of the output, `K ** -0.5` if None.
        initial_state: `[N, HV, V, K]`, or `[N, HV, K, V]` in state layout KV, bf16 or fp32 (fp64 on
            the CPU); zeros if None.
        output_final_state: Whether to return the states after the last token.
        cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences in T (then B is 1). Without
            it every batch row is a sequence, `N = B`.
        chunk_indices: The batch's chunk table, `kda_ops.varlen.prepare_chunk_indices(cu_seqlens,
            T)`; computed if None.
        state: `[slots, HV, V, K]`, or `[slots, HV, K, V]` in state layout KV, bf16 or fp32, any
            strides (padded pages): paged states, read and **written in place**, instead of
            `initial_state`.
        state_indices: `[N]`, int32 or int64, with `state`: the slot of each sequence; unique,
            except those of padding, 0 or negative: there the output is zero, and no state is read
            or written. Kernels treat a slot out of range the same way. None with `state`: sequence
            n is page n of at least N, and none is null.
        has_initial_state: `[N]`, bool, with `state`: where False the sequence starts from zeros.
            All True if None.
        state_layout: `"VK"`, or `"KV"` for states of FLA or transformers, of all three states.
            Where K = V, shapes do not tell one from the other: the argument has to.
        block_table: `[N, blocks]`, int32 or int64, with `state`: the slot of the state after each
            full block of a sequence, of blocks that end in this call; entries that are 0, negative
            or out of range are skipped. A page that is written once must not be written again,
            except by the end of its own sequence. See "block boundaries" in `docs/states.md`.
        context_lens: `[N]`, int32 or int64, with `block_table`: the tokens of each sequence before
            this call, multiples of 64 (kernels write no blocks of others). Zeros if None.
        block_tokens: Tokens of a block, a multiple of 64, with `block_table`.

    Returns:
        `(o, final_state)`. `o [B, T, HV, V]` in the dtype of v; rows past the last sequence are
        zero, and their inputs are not read. `final_state [N, HV, V, K]`, or a view
        `[N, HV, K, V]` of it in state layout KV, in the dtype of `initial_state`, or fp32 (fp64
        with fp64 q) without one; None unless `output_final_state`. The gradient may read o on a
        GPU: in eager code, autograd refuses to go through an o that has been written in place.

    Raises:
        ValueError: An invalid shape, dtype, device or combination of arguments; on the CPU also
            offsets, chunks or slots with wrong values.
        RuntimeError: `state` is given and an input requires grad.
    """
    check_raw_inputs(
        q, k, v, raw_gate, raw_beta, A_log, dt_bias, lower_bound, beta_scale, qk_norm_eps
    )
    check_varlen("q", q, cu_seqlens, chunk_indices, CHUNK)
    check_chunk_states(
        q, v, initial_state, output_final_state, state, state_indices, has_initial_state,
        cu_seqlens, state_layout,
    )  # fmt: skip
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_blocks("state", state, N, block_table, context_lens, block_tokens)
    if scale is None:
        scale = q.shape[3] ** -0.5
    check_number("scale", scale)
    if cu_seqlens is not None and chunk_indices is None:
        chunk_indices = prepare_chunk_indices(cu_seqlens, q.shape[1])
    gate = (rates_of(A_log), dt_bias, lower_bound)
    factors = (beta_scale, qk_norm_eps, scale)
    if state is None:
        if initial_state is not None:
            initial_state = v_first(initial_state, state_layout)
        o, final = selected(chunk_kda_gated_op)(
            q, k, v, raw_gate, raw_beta, *gate, *factors, initial_state, output_final_state,
            cu_seqlens, chunk_indices,
        )  # fmt: skip
        return o, v_first(final, state_layout) if output_final_state else None
    o = selected(chunk_kda_gated_state_op)(
        q, k, v, raw_gate, raw_beta, *gate, *factors, state, state_indices, has_initial_state,
        cu_seqlens, chunk_indices, state_layout, block_table, context_lens, block_tokens or 0,
    )  # fmt: skip
    return o, None
