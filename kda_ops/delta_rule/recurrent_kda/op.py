"""The KDA recurrence on paged states: schema, fake implementation, public function."""

import torch
from torch import Tensor

from kda_ops._checks import (
    check_cu_seqlens_shape,
    check_device,
    check_dtype,
    check_number,
    check_paged_state,
    check_pages,
    check_rank,
    check_shape,
    check_step_tables,
    check_step_values,
    check_width,
)
from kda_ops._registry import define_op, selected
from kda_ops._roles import OFFSETS, SLOTS, STATE_PAGES
from kda_ops.delta_rule.recurrent_kda.reference import recurrent_kda_reference


def recurrent_kda_fake(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def check_recurrent_kda_values(
    q: Tensor, state: Tensor, state_indices: Tensor | None, num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    check_step_values(state, state_indices, num_accepted, cu_seqlens, q.shape[1])


recurrent_kda_op = define_op(
    "recurrent_kda(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    "Tensor? state_indices, Tensor? num_accepted, float scale, Tensor? cu_seqlens, "
    "str state_layout) -> Tensor",
    reference=recurrent_kda_reference,
    fake=recurrent_kda_fake,
    cuda="kda_ops.delta_rule.recurrent_kda.kernel:launch_recurrent_kda",
    roles={"state": STATE_PAGES, "state_indices": SLOTS, "cu_seqlens": OFFSETS},
    check_values=check_recurrent_kda_values,
)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    *,
    num_accepted: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    state_layout: str = "VK",
) -> Tensor:
    """Advances paged KDA states by one or a few tokens per sequence; writes `state` in place.

    Per token and value head, with the state S read as `[K, V]`:

        S <- diag(exp(g)) S;    S <- S + beta k (v - k^T S)^T;    o = scale S^T q

    Slot 0 is the null block, and a negative slot is as good: a sequence that continues from one is
    padding, its output is zero and nothing is written. Two sequences never share a slot. Source:
    Kimi Linear (arXiv:2510.26692), equation 1.

    Args:
        q: `[N, tokens, H, K]`, the same number of tokens for every sequence (1 in plain decode), or
            with `cu_seqlens` `[1, T, H, K]`. Already normalized: apply `l2norm` first. fp16, bf16
            or fp32 (fp64 on the CPU), any strides.
        k: Like q.
        v: `[..., HV, V]` with `HV % H == 0`; value head i uses key head `i // (HV // H)`.
        g: `[..., HV, K]`, log decay in **nats**, any float dtype; -inf forgets the state.
        beta: `[..., HV]`, after its sigmoid.
        state: `[slots, HV, V, K]`, or `[slots, HV, K, V]` in state layout KV; fp32 or bf16 (fp64
            on the CPU), any strides: pages may be padded. Read and written in place.
        state_indices: int32 or int64. `[N]`: the slot of each sequence, which receives the state
            after its last token. `[N, 1 + num_spec]`: one slot per token; the state after token j
            goes to column j (or is dropped if that slot is null), so that any prefix of the tokens
            can be accepted. None: sequence n is page n of at least N, and none is null.
        num_accepted: `[N]`, int32 or int64, in `[1, 1 + num_spec]`: the sequence continues from
            column `num_accepted - 1`. Only with a two-dimensional `state_indices`; None means 1.
        scale: Scale of the output, `K ** -0.5` by default.
        cu_seqlens: `[N + 1]`, int32 or int64: token offsets of ragged sequences in one packed row;
            first 0, non-decreasing, empty sequences allowed, last at most T. Rows after the last
            offset are padding.
        state_layout: `"VK"`, or `"KV"` for a state of FLA or transformers. Where K = V, shapes do
            not tell one from the other: the argument has to.

    Returns:
        `[..., HV, V]`, the dtype of v, contiguous; padding rows are zero.

    Raises:
        ValueError: An invalid shape, dtype or device; on the CPU, or with
            `kda_ops.config.check_values`, also a slot past the last one or of two sequences, a
            `num_accepted` out of range (except for padding), bad `cu_seqlens`, or a sequence longer
            than the columns of `state_indices`. On CUDA without the checks such a slot is treated
            as null and `num_accepted` is clamped.
        RuntimeError: An argument requires grad while grad mode is on.
    """
    check_rank("q", q, 4)
    batch, tokens, H, K = q.shape
    check_rank("v", v, 4)
    HV, V = v.shape[2:]
    if H < 1 or HV % H:
        raise ValueError(f"v must have a multiple of {H} heads like q, got {HV}")
    check_width("q", K)
    check_width("v", V)
    check_shape("k", k, (batch, tokens, H, K))
    check_shape("v", v, (batch, tokens, HV, V))
    check_shape("g", g, (batch, tokens, HV, K))
    check_shape("beta", beta, (batch, tokens, HV))
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        check_dtype(name, x)
    check_paged_state(state, HV, V, K, state_layout)
    if cu_seqlens is not None:
        check_cu_seqlens_shape(cu_seqlens)
        if batch != 1:
            raise ValueError(f"q must have batch size 1 with cu_seqlens, got {batch}")
    N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fewest = 1 if cu_seqlens is not None else max(tokens, 1)
    check_step_tables(state_indices, num_accepted, N, fewest)
    check_pages("state", state, state_indices, N)
    check_device(
        q=q, k=k, v=v, g=g, beta=beta, state=state, state_indices=state_indices,
        num_accepted=num_accepted, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    scale = K**-0.5 if scale is None else scale
    check_number("scale", scale)
    return selected(recurrent_kda_op)(
        q, k, v, g, beta, state, state_indices, num_accepted, scale, cu_seqlens, state_layout
    )
