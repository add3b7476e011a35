"""Chunked KDA: schemas, fake implementations, public function."""

import torch
from torch import Tensor

from kda_ops._checks import (
    check_attention_inputs,
    check_chunk_states,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_varlen,
)
from kda_ops._numerics import CHUNK, accumulation_dtype
from kda_ops._registry import define_op, selected
from kda_ops._roles import BLOCKS, CHUNKS, CONTEXTS, OFFSETS, SLOTS, STATE_PAGES
from kda_ops._saving import SavingForward
from kda_ops.blocks import BLOCK_ARGUMENTS, check_blocks
from kda_ops.delta_rule.chunk_kda.reference import chunk_kda_reference, chunk_kda_state_reference
from kda_ops.delta_rule.chunked.checks import check_chunk_state_values, check_chunk_values
from kda_ops.delta_rule.chunked.gradient_workspace import Saved, saved_fake, saved_size
from kda_ops.delta_rule.chunked.states import chunked_fake, chunked_state_fake
from kda_ops.delta_rule.state_layout import v_first
from kda_ops.native import define_native
from kda_ops.varlen import prepare_chunk_indices


def _check_sums(g_cumsum: Tensor, cu_seqlens: Tensor | None) -> None:
    """No sum is infinite: later gates would be differences of infinities."""
    real = g_cumsum if cu_seqlens is None else g_cumsum[:, : int(cu_seqlens[-1])]
    infinite = torch.isinf(real)
    if infinite.any():
        b, t, h, d = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"g_cumsum must be finite, got {real[b, t, h, d].item()} at token {t}; "
            "a token that is to forget everything takes a gate of -300, or begins a sequence"
        )


def check_chunk_kda_values(
    q: Tensor, g_cumsum: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None
) -> None:
    check_chunk_values(q, cu_seqlens, chunk_indices)
    _check_sums(g_cumsum, cu_seqlens)


def check_chunk_kda_state_values(
    q: Tensor, g_cumsum: Tensor, state: Tensor, state_indices: Tensor | None,
    cu_seqlens: Tensor | None, chunk_indices: Tensor | None, block_table: Tensor | None,
    context_lens: Tensor | None, block_tokens: int,
) -> None:  # fmt: skip
    check_chunk_state_values(
        q, state, state_indices, cu_seqlens, chunk_indices, block_table, context_lens, block_tokens
    )
    _check_sums(g_cumsum, cu_seqlens)


chunk_kda_op = define_op(
    "chunk_kda(Tensor q, Tensor k, Tensor v, Tensor g_cumsum, Tensor beta, float scale, "
    "Tensor? initial_state, bool output_final_state, Tensor? cu_seqlens, Tensor? chunk_indices) "
    "-> (Tensor, Tensor)",
    reference=chunk_kda_reference,
    fake=chunked_fake,
    cuda="kda_ops.delta_rule.chunk_kda.kernel:launch_chunk_kda",
    roles={"cu_seqlens": OFFSETS, "chunk_indices": CHUNKS},
    cuda_backward="kda_ops.delta_rule.chunk_kda.backward:launch_chunk_kda_backward",
    saving=SavingForward(
        Saved._fields,
        "kda_ops.delta_rule.chunk_kda.backward:launch_chunk_kda_saving",
        "kda_ops.delta_rule.chunk_kda.backward:launch_chunk_kda_backward",
        fake=saved_fake,
        size=saved_size,
    ),
    check_values=check_chunk_kda_values,
)

chunk_kda_state_op = define_op(
    "chunk_kda.state(Tensor q, Tensor k, Tensor v, Tensor g_cumsum, Tensor beta, float scale, "
    "Tensor(a!) state, Tensor? state_indices, Tensor? has_initial_state, Tensor? cu_seqlens, "
    f"Tensor? chunk_indices, str state_layout, {BLOCK_ARGUMENTS}) -> Tensor",
    reference=chunk_kda_state_reference,
    fake=chunked_state_fake,
    cuda="kda_ops.delta_rule.chunk_kda.kernel:launch_chunk_kda_state",
    roles={
        "state": STATE_PAGES,
        "state_indices": SLOTS,
        "cu_seqlens": OFFSETS,
        "chunk_indices": CHUNKS,
        "block_table": BLOCKS,
        "context_lens": CONTEXTS,
    },
    check_values=check_chunk_kda_state_values,
)
define_native(chunk_kda_op, "kda_ops.delta_rule.chunked.native:chunk_kda")
define_native(chunk_kda_state_op, "kda_ops.delta_rule.chunked.native:chunk_kda_state")


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cumsum: Tensor,
    beta: Tensor,
    *,
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
    """Kimi Delta Attention over whole sequences, 64 tokens at a time.

    Per value head and token, with `g_t` the token's gate (`G_t` is the sum of `g` over the tokens
    of its chunk up to t):

        S <- diag(2^g_t) S;    S <- S + beta_t k_t (v_t - k_t^T S)^T;    o_t = scale * S^T q_t

    No gate is clamped, even one that decays by e^-60 in a token: all exponents of powers of two are
    <= 0. They are differences of sums in fp32, so the relative error of a decay between two tokens
    is about 1e-7 |G| (plus 2e-4 for 16-bit inputs on a GPU): gates near a very strong one lose
    digits, and after -inf they would lose all of them. To forget the state, give a token a gate of
    -300, a decay of 0, or start a new sequence. Source: Kimi Linear (arXiv:2510.26692), section 3,
    in the chunked WY form.

    Args:
        q: `[B, T, H, K]`, already normalized: apply `l2norm` first. fp16, bf16 or fp32 (fp64 on the
            CPU), any strides (copied if the last one is not 1). On a GPU, GEMMs within a chunk of
            16-bit q and k are in fp16, so their entries must be below 65504; normalized ones are.
        k: `[B, T, H, K]`, dtype of q. `|k| <= 1` and `beta <= 2` keep the recurrence stable.
        v: `[B, T, HV, V]`, dtype of q, `HV % H == 0`: value head i uses key head `i // (HV // H)`.
        g_cumsum: `[B, T, HV, K]` in **log2**, the cumulative gate from `gate_cumsum`, which
            restarts every 64 tokens and at every sequence start. Finite; on a GPU infinite sums
            give NaN. fp32 (fp64 with fp64 q).
        beta: `[B, T, HV]` after its sigmoid, any floating dtype.
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
        with fp64 q) without one; None unless `output_final_state`.

    Raises:
        ValueError: An invalid shape, dtype, device or combination of arguments; on the CPU also
            offsets, chunks or slots with wrong values, and an infinite g_cumsum.
        RuntimeError: `state` is given and an input requires grad.
    """
    check_attention_inputs(q, k, v, beta)
    check_shape("g_cumsum", g_cumsum, (*v.shape[:3], q.shape[3]))
    check_dtype("g_cumsum", g_cumsum, (accumulation_dtype(q),))
    check_device(q=q, k=k, v=v, g_cumsum=g_cumsum, beta=beta)
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
    if state is None:
        if initial_state is not None:
            initial_state = v_first(initial_state, state_layout)
        o, final = selected(chunk_kda_op)(
            q, k, v, g_cumsum, beta, scale, initial_state, output_final_state, cu_seqlens,
            chunk_indices,
        )  # fmt: skip
        return o, v_first(final, state_layout) if output_final_state else None
    o = selected(chunk_kda_state_op)(
        q, k, v, g_cumsum, beta, scale, state, state_indices, has_initial_state, cu_seqlens,
        chunk_indices, state_layout, block_table, context_lens, block_tokens or 0,
    )  # fmt: skip
    return o, None
