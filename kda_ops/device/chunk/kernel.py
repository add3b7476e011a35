"""What the kernels of chunked KDA have in common: one operator takes the cumulative gate, another
the raw one.

Two kernels, `prepare` and `scan` (`kda_ops.device.scan`), or one of each in general form. Between
them lies a workspace (`kda_ops.device.workspace`). Here is how a program finds its chunk, what both
operators' `prepare` do alike, and the general `prepare`.

Every power of two has an exponent <= 0, whatever the gate. Rows i and j < i of a chunk meet at
exactly one level s of 1, 2, ..., 32: in one block of 2s rows, i in its right and j in its left
half. With a the last row of the left half, 2^(G_i - G_j) = 2^(G_i - G_a) 2^(G_a - G_j), so one tile
2^-|G - G_a| per level serves as the row factor on the right and as the column factor on the left.
The inverse of I + L is joined level by level in the same way: X <- X - X L_s X.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.device.workspace import Batch, Workspace


@triton.jit
def sequence_rows(cu_ptr, n, T, N, VARLEN: tl.constexpr):
    """Batch row, first token and end of sequence n, and its first workspace row; in bounds for any
    offsets.
    """
    if VARLEN:
        b = n * 0
        start = tl.load(cu_ptr + n, mask=n < N, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), T)
        end = tl.load(cu_ptr + n + 1, mask=n < N, other=0).to(tl.int64)
        end = tl.minimum(tl.maximum(end, start), T)
        row = start // 64 + n
    else:
        b = n
        start = n * 0
        end = n * 0 + T
        row = n * T // 64 + n
    return b, start, end, row


@triton.jit
def chunk_rows(p, chunks_ptr, cu_ptr, T, N, NC, VARLEN: tl.constexpr):
    """Batch row, first token, token count (0: nothing to do) and workspace row of program p's
    chunk.

    With `cu_seqlens` NC is the number of rows of the chunk table, of which any may be wrong;
    without, NC programs per batch row are launched.
    """
    if VARLEN:
        listed = p < NC
        n = tl.load(chunks_ptr + 2 * p, mask=listed, other=-1).to(tl.int64)
        c = tl.load(chunks_ptr + 2 * p + 1, mask=listed, other=-1).to(tl.int64)
        real = (n >= 0) & (n < N) & (c >= 0)
        n = tl.where(real, n, 0)
        c = tl.where(real, c, T // 64 + 1)
    else:
        n = p // NC
        c = p % NC
    b, start, end, row = sequence_rows(cu_ptr, n, T, N, VARLEN)
    first = start + c * 64
    count = tl.maximum(tl.minimum(end - first, 64), 0).to(tl.int32)
    return b, first, count, row + c


@triton.jit
def slab_rows(
    p, chunks_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN: tl.constexpr, SLABS: tl.constexpr
):
    """`chunk_rows` in a slab of the workspace, with p, and whether the chunk is in the slab.

    Program p's row is between p and p + N, so a slab's chunks are those of `rows + N` programs.
    """
    if SLABS:
        p += tl.maximum(first_row - N, 0)
    b, first, count, row = chunk_rows(p, chunks_ptr, cu_ptr, T, N, NC, VARLEN)
    inside = count > 0
    if SLABS:
        if not VARLEN:
            inside = inside & (b < N)  # there are more programs than chunks
        row -= first_row
        inside = inside & (row >= 0) & (row < rows)
    return p, b, first, count, row, inside


@triton.jit
def clear_padding(
    o_ptr, cu_ptr, p, h, T, N, NC, HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr
):
    """Zeroes 64 of the rows that lie past the last sequence, counted from the end of the tokens.

    The programs without a chunk do it. They are the last of the NC + 1, and they suffice: there are
    at most `end // 64 + N` chunks.
    """
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + N).to(tl.int64), 0), T)
    t = T - (NC + 1 - p) * 64 + tl.arange(0, 64)
    d = tl.arange(0, VP)
    zero = tl.zeros((64, VP), tl.float32).to(o_ptr.dtype.element_ty)
    ok = ((t >= end) & (t < T))[:, None] & (d < V)[None, :]
    tl.store(o_ptr + (t[:, None] * HV + h) * V + d[None, :], zero, mask=ok)


@triton.jit
def _multiply(a, b, PACKED: tl.constexpr):
    """A product of fp16 tiles, on NVIDIA GPUs two per instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.float16)


@triton.jit
def laid_out_as(x, y, PACKED: tl.constexpr):
    """x, on NVIDIA GPUs in the layout that y has."""
    if not PACKED:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=x.dtype, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=x.dtype, is_pure=False, pack=2
        )


@triton.jit
def half(mask):
    """A mask as fp16 zeros and ones."""
    return tl.where(mask, 1.0, 0.0).to(tl.float16)


@triton.jit
def half_like(mask, y, PACKED: tl.constexpr):
    if y.dtype == tl.float32:
        return laid_out_as(tl.where(mask, 1.0, 0.0), y, PACKED).to(tl.float16)
    else:
        return laid_out_as(half(mask), y, PACKED)


@triton.jit
def _meet(i, j, s):
    """Whether rows i and columns j meet at level s."""
    return (i // (2 * s) == j // (2 * s)) & ((i // s) % 2 == 1) & ((j // s) % 2 == 0)


@triton.jit
def _between(i, t, s):
    """The 0/1 matrix that sums the tokens' gates between row i and its anchor at level s: its
    product with y is -|G_i - G_a|.
    """
    a = (i // (2 * s)) * (2 * s) + s - 1
    return (t > tl.minimum(i, a)) & (t <= tl.maximum(i, a))


@triton.jit
def join(X, L):
    """The inverse with one more level L of the lower triangle. Entries stay bounded (`|k| <= 1`),
    so fp16 does as well as tf32.
    """
    Xh = X.to(tl.float16)
    return X - tl.dot(tl.dot(Xh, L.to(tl.float16)).to(tl.float16), Xh)


@triton.jit
def _small_decays(i, j, y, s: tl.constexpr):
    """2^-|G - G_a| of a level s <= 8 of the four 16-row blocks of y, [4, 16, K]."""
    between = tl.broadcast_to(_between(i, j, s)[None, :, :], (4, 16, 16))
    return tl.exp2(tl.dot(half(between), y)).to(tl.float16)


@triton.jit
def _small_level(X, A, i, j, q, k, e, beta, s: tl.constexpr, PACKED: tl.constexpr):
    """A level s <= 8 of the four 16-row blocks: q, k, e [4, 16, K] -> inverse and q k^T, [4, 16,
    16].
    """
    ke = _multiply(k, e, PACKED)
    qe = _multiply(q, e, PACKED)
    columns = tl.permute(ke, (0, 2, 1))
    meet = _meet(i, j, s)[None, :, :]
    L = tl.where(meet, tl.dot(ke, columns) * beta, 0.0)
    A = tl.where(meet, tl.dot(qe, columns), A)
    X = X - L if s == 1 else join(X, L)
    return X, A


@triton.jit
def block_diagonal(x):
    """[4, 16, 16] -> [64, 64]."""
    r = tl.arange(0, 64)
    x = tl.broadcast_to(tl.reshape(x, (4, 16, 1, 16)), (4, 16, 4, 16))
    return tl.where(r[:, None] // 16 == r[None, :] // 16, tl.reshape(x, (64, 64)), 0.0)


@triton.jit
def chunk_levels(q, k, y, beta, PACKED: tl.constexpr):
    """All levels of one chunk: q, k [4, 16, K], the tokens' gates y [64, K] in fp16, beta [64].

    Returns q k^T with the decays [64, 64], the inverse of the 16-row blocks [4, 16, 16], and levels
    16 and 32 of L, [64, 64] in fp16.

    Normalised q and k and their decays are at most 1 in magnitude, so the products are made in
    fp16: three bits more than bf16, and an eighth less error of the output.
    """
    K: tl.constexpr = k.shape[1]
    q = tl.reshape(q.to(tl.float16), (4, 16, K))
    k = tl.reshape(k.to(tl.float16), (4, 16, K))
    r = tl.arange(0, 64)
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    diagonal = (i == j)[None, :, :]
    y_blocks = tl.reshape(y, (4, 16, K))
    beta_blocks = tl.reshape(beta, (4, 16))[:, :, None]
    e = _small_decays(i, j, y_blocks, 1)
    q = laid_out_as(q, e, PACKED)
    k = laid_out_as(k, e, PACKED)
    X = tl.where(diagonal, 1.0, 0.0) + tl.zeros((4, 16, 16), tl.float32)
    A = tl.where(diagonal, tl.dot(q, tl.permute(k, (0, 2, 1))), 0.0)
    X, A = _small_level(X, A, i, j, q, k, e, beta_blocks, 1, PACKED)
    e = _small_decays(i, j, y_blocks, 2)
    X, A = _small_level(X, A, i, j, q, k, e, beta_blocks, 2, PACKED)
    e = _small_decays(i, j, y_blocks, 4)
    X, A = _small_level(X, A, i, j, q, k, e, beta_blocks, 4, PACKED)
    e = _small_decays(i, j, y_blocks, 8)
    X, A = _small_level(X, A, i, j, q, k, e, beta_blocks, 8, PACKED)
    i = r[:, None]
    j = r[None, :]
    A = block_diagonal(A)

    meet = _meet(i, j, 16)
    e = tl.reshape(
        tl.exp2(tl.dot(half_like(_between(i, j, 16), A, PACKED), y)).to(k.dtype), (4, 16, K)
    )
    ke = tl.reshape(_multiply(k, e, PACKED), (64, K))
    columns = tl.trans(ke)
    A = tl.where(meet, tl.dot(tl.reshape(_multiply(q, e, PACKED), (64, K)), columns), A)
    L16 = tl.where(meet, tl.dot(ke, columns) * beta[:, None], 0.0).to(tl.float16)

    meet = _meet(i, j, 32)
    e = tl.reshape(
        tl.exp2(tl.dot(half_like(_between(i, j, 32), L16, PACKED), y)).to(k.dtype), (4, 16, K)
    )
    ke = tl.reshape(_multiply(k, e, PACKED), (64, K))
    columns = tl.trans(ke)
    A = tl.where(meet, tl.dot(tl.reshape(_multiply(q, e, PACKED), (64, K)), columns), A)
    L32 = tl.where(meet, tl.dot(ke, columns) * beta[:, None], 0.0).to(tl.float16)
    return A, X, L16, L32, tl.reshape(q, (64, K)), tl.reshape(k, (64, K))


@triton.jit
def prepare_chunk(
    q,
    k,
    y,
    beta,
    v_ptr,
    v_t,
    o_ptr,
    w_ptr,
    u_ptr,
    kg_ptr,
    qg_ptr,
    A_ptr,
    work,
    token,
    count,
    h,
    SCALE: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All of a chunk's workspace row but the decay, from tiles q, k [64, K], the tokens' gates y
    [64, K] in fp16 and beta [64]; v_ptr is the chunk's first row of v, v_t its stride of tokens.

    Exponents come as 0/1 matrices times y, also G and G_last - G, so that no sum over tokens stays
    in registers.
    """
    A, X, L16, L32, q, k = chunk_levels(q, k, y, beta, PACKED)
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    if SCALE != 1.0:
        A = A * SCALE
    tl.store((A_ptr + work * 4096) + (i * 64 + j), A.to(A_ptr.dtype.element_ty))
    # loaded before it is needed: with two programs per multiprocessor
    # little else hides the latency
    v_at = v_ptr + (i * v_t + tl.arange(0, V)[None, :])
    v = tl.load(v_at, mask=i < count, other=0.0)
    X = join(join(block_diagonal(X), L16), L32)
    X = (X * beta[None, :]).to(v.dtype)
    # u first: half the spills of the other order
    u = tl.dot(X, v)
    store_u(u_ptr, o_ptr, u, work, token, count, h, HV, V, 0, V)
    at = i * K + tl.arange(0, K)[None, :]
    e = tl.exp2(tl.dot(half_like(j > i, X, PACKED), y))  # 2^(G_last - G)
    k = k.to(tl.float32)
    tl.store((kg_ptr + work * (64 * K)) + at, (k * e).to(kg_ptr.dtype.element_ty))
    e = tl.exp2(tl.dot(half_like(j <= i, X, PACKED), y))  # 2^G
    q = q.to(tl.float32)
    if SCALE != 1.0:
        q = q * SCALE
    qg = q * e
    tl.store((qg_ptr + work * (64 * K)) + at, qg.to(qg_ptr.dtype.element_ty))
    w = tl.dot(X, (k * e).to(X.dtype))
    tl.store((w_ptr + work * (64 * K)) + at, w.to(w_ptr.dtype.element_ty))


@triton.jit
def store_u(
    u_ptr,
    o_ptr,
    u,
    work,
    token,
    count,
    h,
    HV: tl.constexpr,
    V: tl.constexpr,
    v0,
    BLOCK: tl.constexpr,
):
    """Columns v0 to v0 + BLOCK of a chunk's u: to its workspace row, or without one to the output's
    `count` rows from `token` on.
    """
    r = tl.arange(0, 64)[:, None]
    v = (v0 + tl.arange(0, BLOCK))[None, :]
    if u_ptr is None:
        at = o_ptr + (token * HV + h) * V + (r * (HV * V) + v)
        tl.store(at, u.to(o_ptr.dtype.element_ty), mask=(r < count) & (v < V))
    else:
        at = u_ptr + work * (64 * V) + (r * V + v)
        tl.store(at, u.to(u_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def full_dot(a, b):
    """A product whose fp32 operands keep all their bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def chunk_prepare_general_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    G_ptr,
    beta_ptr,
    o_ptr,
    w_ptr,
    u_ptr,
    kg_ptr,
    qg_ptr,
    A_ptr,
    decay_ptr,
    cu_ptr,
    chunks_ptr,
    T,
    N,
    NC,
    first_row,
    rows,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    G_b,
    G_t,
    G_h,
    beta_b,
    beta_t,
    beta_h,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    SLABS: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BLOCK: tl.constexpr,
    FP32: tl.constexpr,
):
    """One program prepares one chunk of one value head, in blocks of BLOCK key or value columns.
    Grid: (chunks, HV).

    The workspace is KP columns wide, and zero past K. Products are made in v's dtype, those of
    the inverse in fp16, or all in full fp32.
    """
    p = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    p, b, first, count, row, inside = slab_rows(
        p, chunks_ptr, cu_ptr, T, N, NC, first_row, rows, VARLEN, SLABS
    )
    if not inside:
        if VARLEN and count == 0:
            clear_padding(o_ptr, cu_ptr, p, h, T, N, NC, HV, V, VP)
        return
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    inverse: tl.constexpr = tl.float32 if FP32 else tl.float16
    hk = h // (HV // H)
    r = tl.arange(0, 64)
    d = tl.arange(0, BLOCK)
    ok = (r < count)[:, None]
    t = first + r
    q_head = q_ptr + b * q_b + hk * q_h + t[:, None] * q_t
    k_head = k_ptr + b * k_b + hk * k_h + t[:, None] * k_t
    G_head = G_ptr + b * G_b + h * G_h
    # padding lanes repeat the last token's G, so that their exponents stay <= 0
    G_row = G_head + (first + tl.minimum(r, count - 1))[:, None] * G_t
    beta = tl.load(beta_ptr + b * beta_b + h * beta_h + t * beta_t, mask=r < count, other=0.0).to(
        tl.float32
    )
    i = r[:, None]
    j = r[None, :]

    A = tl.zeros((64, 64), tl.float32)
    L = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, K, BLOCK):
        cols = (k0 + d)[None, :]
        q = tl.load(q_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        k = tl.load(k_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        G = tl.load(G_row + cols, mask=cols < K, other=0.0)
        A += tl.where(i == j, full_dot(q.to(dtype), tl.trans(k.to(dtype))), 0.0)
        for level in range(6):
            s = 1 << level
            a = tl.minimum((r // (2 * s)) * (2 * s) + s - 1, count - 1)
            e = tl.exp2(
                -tl.abs(
                    G
                    - tl.load(G_head + (first + a)[:, None] * G_t + cols, mask=cols < K, other=0.0)
                )
            )
            columns = tl.trans((k * e).to(dtype))
            meet = _meet(i, j, s)
            A += tl.where(meet, full_dot((q * e).to(dtype), columns), 0.0)
            L += tl.where(meet, full_dot((k * e).to(dtype), columns), 0.0)
    L = L * beta[:, None]
    X = tl.where(i == j, 1.0, 0.0)
    for level in range(6):
        Xi = X.to(inverse)
        LX = full_dot(tl.where(_meet(i, j, 1 << level), L, 0.0).to(inverse), Xi)
        X = X - full_dot(Xi, LX.to(inverse))
    X = (X * beta[None, :]).to(dtype)

    work = row * HV + h
    tl.store(A_ptr + work * 4096 + i * 64 + j, (A * SCALE).to(A_ptr.dtype.element_ty))
    for k0 in range(0, KP, BLOCK):
        cols = (k0 + d)[None, :]
        q = tl.load(q_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        k = tl.load(k_head + cols, mask=ok & (cols < K), other=0.0).to(tl.float32)
        G = tl.load(G_row + cols, mask=cols < K, other=0.0)
        last = tl.load(G_head + (first + count - 1) * G_t + k0 + d, mask=k0 + d < K, other=0.0)
        tl.store(decay_ptr + work * KP + k0 + d, tl.exp2(last))
        at = work * (64 * KP) + i * KP + cols
        e = tl.exp2(G)
        tl.store(kg_ptr + at, (k * tl.exp2(last[None, :] - G)).to(kg_ptr.dtype.element_ty))
        tl.store(qg_ptr + at, (q * e * SCALE).to(qg_ptr.dtype.element_ty))
        w = full_dot(X, (k * e).to(dtype))
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty))
    v_head = v_ptr + b * v_b + h * v_h + t[:, None] * v_t
    for v0 in range(0, V, BLOCK):
        cols = (v0 + d)[None, :]
        u = full_dot(X, tl.load(v_head + cols, mask=ok & (cols < V), other=0.0))
        store_u(u_ptr, o_ptr, u, work, b * T + first, count, h, HV, V, v0, BLOCK)


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def launch_general_prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor,
    beta: Tensor,
    scale: float,
    o: Tensor,
    workspace: Workspace,
    batch: Batch,
) -> None:
    """`prepare` for any size and dtype, from normalised keys (in v's dtype or fp32), the cumulative
    gate in log2 and beta after its sigmoid.
    """
    H, K = q.shape[2:]
    HV, V = v.shape[2:]
    wide = v.dtype == torch.float32
    traceable(chunk_prepare_general_kernel)[(batch.programs, HV)](
        q,
        k,
        v,
        G,
        beta,
        o,
        *workspace.tiles,
        *batch.tables,
        *(stride for x in (q, k, v, G, beta) for stride in x.stride()[:3]),
        SCALE=scale,
        H=H,
        HV=HV,
        K=K,
        V=V,
        VARLEN=batch.cu_seqlens is not None,
        SLABS=batch.slab is not None,
        KP=workspace.w.shape[3],
        VP=triton.next_power_of_2(V),
        BLOCK=16,
        FP32=wide,
        # 16-bit: with 4 warps Triton 3.6 makes warp-group products of these loops and reads
        # outside shared memory on sm_90; 2 warps keep it at the older instruction
        num_warps=4 if wide else 2,
        num_stages=1,
    )
