"""The KDA recurrence on paged states as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import contiguous, traceable
from kda_ops.delta_rule.kernel import flat_rows, rounded_product, slot_table
from kda_ops.delta_rule.state_layout import state_strides
from kda_ops.tuning import choose


@triton.jit
def recurrent_kda_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, indices_ptr, accepted_ptr, cu_ptr, o_ptr,
    N, rows, tokens, slots, columns,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, state_slot,
    state_head, state_v, state_k, indices_row, indices_column,
    SCALE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program advances BLOCK_V rows of the state of one sequence and value head by its tokens.

    The state tile stays in registers between the first read and the writes, and no other program
    touches those rows, so a slot may be read and written in one launch. Grid: sequences x HV x V
    blocks, flattened, V blocks fastest; with `cu_seqlens` one more "sequence" zeroes the padding
    rows after the last one. A sequence whose slot is null or out of range neither reads nor writes
    a state and outputs zeros. Without slots sequence n is on page n.
    """
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    ACC: tl.constexpr = tl.float32
    program = tl.program_id(0)
    n = (program // (HV * V_BLOCKS)).to(tl.int64)
    hv = (program // V_BLOCKS % HV).to(tl.int64)
    h = hv // (HV // H)
    i_v = (program % V_BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_k = tl.arange(0, BLOCK_K)
    ok_v = i_v < V
    ok_k = i_k < K
    ok = ok_v[:, None] & ok_k[None, :]
    if n < N:
        first = n * tokens
        length = tokens
        if VARLEN:
            first = tl.minimum(tl.maximum(tl.load(cu_ptr + n).to(tl.int64), 0), rows)
            last = tl.minimum(tl.load(cu_ptr + n + 1).to(tl.int64), rows)
            length = (last - first).to(tl.int32)
        column = 0
        if HAS_ACCEPTED:
            column = tl.load(accepted_ptr + n).to(tl.int64) - 1
            column = tl.minimum(tl.maximum(column, 0), columns - 1)
        if indices_ptr is None:
            source = n
            live = n < slots
        else:
            source = tl.load(indices_ptr + n * indices_row + column * indices_column).to(tl.int64)
            live = (source > 0) & (source < slots)
        tile = hv * state_head + i_v.to(tl.int64)[:, None] * state_v + i_k[None, :] * state_k
        S = tl.load(state_ptr + source * state_slot + tile, mask=ok & live, other=0.0)
        S = S.to(ACC)  # [BLOCK_V, BLOCK_K]
        for j in range(length):
            row = first + j
            q = tl.load(q_ptr + row * q_row + h * q_head + i_k, mask=ok_k, other=0.0).to(ACC)
            k = tl.load(k_ptr + row * k_row + h * k_head + i_k, mask=ok_k, other=0.0).to(ACC)
            g = tl.load(g_ptr + row * g_row + hv * g_head + i_k, mask=ok_k, other=0.0).to(ACC)
            v = tl.load(v_ptr + row * v_row + hv * v_head + i_v, mask=ok_v, other=0.0).to(ACC)
            beta = tl.load(beta_ptr + row * beta_row + hv * beta_head).to(ACC)
            S *= tl.exp(g)[None, :]
            delta = beta * (v - tl.sum(rounded_product(S, k[None, :]), axis=1))  # [BLOCK_V]
            S += delta[:, None] * k[None, :]
            o = SCALE * tl.sum(rounded_product(S, q[None, :]), axis=1)
            o = tl.where(live, o, 0.0).to(o_ptr.dtype.element_ty)
            tl.store(o_ptr + (row * HV + hv) * V + i_v, o, mask=ok_v)
            if PER_TOKEN:
                slot = tl.load(
                    indices_ptr + n * indices_row + j * indices_column, mask=j < columns, other=0
                ).to(tl.int64)
                kept = live & (slot > 0) & (slot < slots)
                tl.store(
                    state_ptr + slot * state_slot + tile,
                    S.to(state_ptr.dtype.element_ty),
                    mask=ok & kept,
                )
        if not PER_TOKEN:
            written = live & (length > 0)
            tl.store(
                state_ptr + source * state_slot + tile,
                S.to(state_ptr.dtype.element_ty),
                mask=ok & written,
            )
    elif VARLEN:
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + N).to(tl.int64), 0), rows)
        zero = tl.zeros([BLOCK_V], dtype=o_ptr.dtype.element_ty)
        for j in range((rows - end).to(tl.int32)):
            tl.store(o_ptr + ((end + j) * HV + hv) * V + i_v, zero, mask=ok_v)


def launch_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
    state_indices: Tensor | None, num_accepted: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, state_layout: str,
) -> Tensor:  # fmt: skip
    H, K, HV, V = int(q.shape[-2]), int(q.shape[-1]), int(v.shape[-2]), int(v.shape[-1])
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = v.shape[0] * v.shape[1]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v, g = (flat_rows(x, rows) for x in (q, k, v, g))
    beta = beta.reshape(rows, HV)
    per_token, columns, *table_strides = slot_table(state_indices)
    varlen = cu_seqlens is not None
    chosen = choose("recurrent_kda", q.device, K=K, V=V, state=state.dtype, per_token=per_token)
    block_k = triton.next_power_of_2(K)
    block_v = max(1, min(triton.next_power_of_2(V), chosen["TILE"] // block_k))
    programs = HV * triton.cdiv(V, block_v)
    # without cu_seqlens an empty batch still launches: CUDA has no empty grid
    sequences = N + 1 if varlen else torch.sym_max(N, 1)
    traceable(recurrent_kda_kernel)[(sequences * programs,)](
        q, k, v, g, beta, state, state_indices, contiguous(num_accepted), contiguous(cu_seqlens), o,
        N, rows, 0 if varlen else o.shape[1], state.shape[0], columns, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *g.stride()[:2], *beta.stride(),
        *state_strides(state, state_layout=state_layout), *table_strides,
        SCALE=scale, H=H, HV=HV, K=K, V=V, BLOCK_K=block_k, BLOCK_V=block_v, PER_TOKEN=per_token,
        HAS_ACCEPTED=num_accepted is not None, VARLEN=varlen, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return o
