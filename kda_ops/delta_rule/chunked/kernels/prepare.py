"""The body of the fast `prepare` of chunked KDA, shared by two operators: a program has one chunk
of a head, with K and V of 64 or 128 in 16 bits.

Every power of two has an exponent <= 0, for any gate. Rows i and j < i of a chunk meet at exactly
one level s of 1, 2, ..., 32: in one block of 2s rows, i in its right and j in its left half. With a
the last row of the left half, 2^(G_i - G_j) = 2^(G_i - G_a) 2^(G_a - G_j), so one tile 2^-|G - G_a|
per level serves as the row factor on the right and as the column factor on the left. With B =
diag(beta) and M the strictly lower part of k k^T with its decays, X = (I + B M)^-1 B is joined
level by level in the same way, starting from X = B: X <- X - X M_s X. So only the rows' betas are
needed, once.

The kernels are register-bound: two programs per multiprocessor, 255 registers per thread. Values
live from the loads to the last stores (row numbers, masks) would spill, be reloaded from L2 and
cost 3 to 20 % of the time. So rows past a sequence's end are read as its last row instead of under
masks, and `opaque` separates early from late computations. Levels 2 and 4 are a loop although they
could be unrolled: its edges keep the compiler from interleaving levels, which spilled more
(`perf/notes/chunk_kda.md`), and within a level the decays of the next one overlap with its GEMMs.
"""

import triton
import triton.language as tl

from kda_ops.delta_rule.chunked.kernels.tiles import meets, store_u, tiles_of


@triton.jit
def multiply(a, b, PACKED: tl.constexpr):
    """An elementwise product of fp16 tiles, on NVIDIA GPUs two per instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.float16)


@triton.jit
def laid_out_as(x, y, PACKED: tl.constexpr):
    """x, on NVIDIA GPUs in the layout of y, a GEMM's result.

    Otherwise the compiler converts a tile from the layout it was loaded in to that of each use,
    even where two of them are the same bits (q and k for the levels up to 8 and above), and makes a
    0/1 matrix in a layout of its own, stored two bytes at a time for its GEMM. This instruction
    ties x to y, which the compiler does not recompute in another layout. It is pure: with any other
    PyTorch assumes that the kernel writes all its inputs, and copies them.
    """
    if not PACKED:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=2
        )


@triton.jit
def opaque(x, PACKED: tl.constexpr):
    """x, a 32-bit integer, opaque to CSE: the compiler does not keep values computed from x for
    later uses.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def half(mask):
    """A mask as fp16 zeros and ones."""
    return tl.where(mask, 1.0, 0.0).to(tl.float16)


@triton.jit
def half_like(mask, y, PACKED: tl.constexpr):
    """`half` in the layout of y, which has 16 or 32 bits."""
    if y.dtype == tl.float32:
        return laid_out_as(tl.where(mask, 1.0, 0.0), y, PACKED).to(tl.float16)
    else:
        return laid_out_as(half(mask), y, PACKED)


@triton.jit
def rows_between(i, t, s):
    """The 0/1 matrix that sums the tokens' gates between row i and its anchor at level s: times y
    it gives -|G_i - G_a|.
    """
    a = (i // (2 * s)) * (2 * s) + s - 1
    return (t > tl.minimum(i, a)) & (t <= tl.maximum(i, a))


@triton.jit
def join(X, M):
    """X with one more level M of the lower triangle. Entries stay bounded (`|k| <= 1`), so fp16 is
    as good as tf32.
    """
    Xh = X.to(tl.float16)
    return X - tl.dot(tl.dot(Xh, M.to(tl.float16)).to(tl.float16), Xh)


@triton.jit
def small_decays(i, j, y, s):
    """2^-|G - G_a| of a level s <= 8 of the four 16-row blocks of y, [4, 16, K]."""
    between = tl.broadcast_to(rows_between(i, j, s)[None, :, :], (4, 16, 16))
    return tl.exp2(tl.dot(half(between), y)).to(tl.float16)


@triton.jit
def small_level(A, ke, qe, i, j, s):
    """A level s <= 8 of the four 16-row blocks from keys and queries with its decays [4, 16, K]:
    q k^T with it, and M, [4, 16, 16].
    """
    columns = tl.permute(ke, (0, 2, 1))
    meet = meets(i, j, s)[None, :, :]
    A = tl.where(meet, tl.dot(qe, columns), A)
    return A, tl.where(meet, tl.dot(ke, columns), 0.0)


@triton.jit
def block_diagonal(x):
    """[4, 16, 16] -> [64, 64]."""
    r = tl.arange(0, 64)
    x = tl.broadcast_to(tl.reshape(x, (4, 16, 1, 16)), (4, 16, 4, 16))
    return tl.where(r[:, None] // 16 == r[None, :] // 16, tl.reshape(x, (64, 64)), 0.0)


@triton.jit
def large_level(A, q, k, y, like, s: tl.constexpr, PACKED: tl.constexpr):
    """Level 16 or 32: q k^T with it, and M, [64, 64] in fp16; `like` has a GEMM result's layout."""
    K: tl.constexpr = k.shape[2]
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    meet = meets(i, j, s)
    e = tl.exp2(tl.dot(half_like(rows_between(i, j, s), like, PACKED), y)).to(k.dtype)
    e = tl.reshape(e, (4, 16, K))
    ke = tl.reshape(multiply(k, e, PACKED), (64, K))
    columns = tl.trans(ke)
    A = tl.where(meet, tl.dot(tl.reshape(multiply(q, e, PACKED), (64, K)), columns), A)
    return A, tl.where(meet, tl.dot(ke, columns), 0.0).to(tl.float16)


@triton.jit
def chunk_levels(q, k, y, beta, beta_before, PACKED: tl.constexpr):
    """All levels of one chunk: q, k [64, K], the tokens' gates y [64, K] in fp16, beta of each row
    and of the row before [64], which save level 1 two GEMMs.

    Returns q k^T with the decays [64, 64], X up to level 16 and level 32 of M, [64, 64] in fp16,
    and q and k in fp16.

    Normalized q and k and their decays are at most 1 in magnitude, so the GEMMs are in fp16: three
    bits more than bf16, and an eighth less error in the output.
    """
    K: tl.constexpr = k.shape[1]
    q = tl.reshape(q.to(tl.float16), (4, 16, K))
    k = tl.reshape(k.to(tl.float16), (4, 16, K))
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    diagonal = (i == j)[None, :, :]
    y_blocks = tl.reshape(y, (4, 16, K))
    e = small_decays(i, j, y_blocks, 1)
    q = laid_out_as(q, e, PACKED)
    k = laid_out_as(k, e, PACKED)
    X = tl.where(diagonal, tl.reshape(beta, (4, 16))[:, :, None], 0.0)
    A = tl.where(diagonal, tl.dot(q, tl.permute(k, (0, 2, 1))), 0.0)
    e_next = small_decays(i, j, y_blocks, 2)
    A, M = small_level(A, multiply(k, e, PACKED), multiply(q, e, PACKED), i, j, 1)
    e = e_next
    X = X - M * tl.reshape(beta * beta_before, (4, 16))[:, :, None]
    for level in tl.range(1, 3, num_stages=1):
        s = 1 << level
        ke = multiply(k, e, PACKED)
        qe = multiply(q, e, PACKED)
        e = small_decays(i, j, y_blocks, 2 * s)
        A, M = small_level(A, ke, qe, i, j, s)
        X = join(X, M)
    A, M = small_level(A, multiply(k, e, PACKED), multiply(q, e, PACKED), i, j, 8)
    X = join(X, M)
    A = block_diagonal(A)
    A, M = large_level(A, q, k, y, A, 16, PACKED)
    # fp16 saves 16 registers meanwhile; rounds beta twice (`perf/notes/chunk_kda.md`)
    X = join(block_diagonal(X), M).to(tl.float16)
    A, M = large_level(A, q, k, y, A, 32, PACKED)
    return A, X, M, tl.reshape(q, (64, K)), tl.reshape(k, (64, K))


@triton.jit
def prepare_chunk(
    q, k, y, beta, beta_before,
    v_ptr, v_t,
    o_ptr, tiles_ptr, u_ptr,
    work, token, count, h,
    SCALE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, UNPACKED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A chunk's workspace row except the decay, from tiles q, k [64, K], the tokens' gates y
    [64, K] in fp16 and beta of each row and of the row before [64]; v_ptr is the chunk's first row
    of v, v_t its token stride.

    In the rows from `count` on, q and k may have any finite values; y and beta are zero. UNPACKED
    says whether to use `opaque`: which spills less differs between the kernels.

    Exponents are 0/1 matrices times y, also G and G_last - G, so that no sum over tokens stays in
    registers.
    """
    A, X, M, q, k = chunk_levels(q, k, y, beta, beta_before, PACKED)
    w_ptr, kg_ptr, qg_ptr, A_ptr = tiles_of(tiles_ptr, work, K)
    dtype: tl.constexpr = tiles_ptr.dtype.element_ty
    if UNPACKED:
        count = opaque(count, PACKED)
    r = tl.arange(0, 64)
    i = r[:, None]
    j = r[None, :]
    if SCALE != 1.0:
        A = A * SCALE
    tl.store(A_ptr + (i * 64 + j), A.to(dtype))
    # loaded early: two programs per multiprocessor hide little latency
    d = tl.arange(0, V)[None, :]
    v = tl.load(v_ptr + (tl.minimum(i, count - 1) * v_t + d))
    X = join(X, M).to(v.dtype)
    # u first, before the exponents take its registers
    u = tl.dot(X, v)
    store_u(u_ptr, o_ptr, u, work, token, count, h, HV, V, 0, V)
    at = i * K + tl.arange(0, K)[None, :]
    e = tl.exp2(tl.dot(half_like(j > i, X, PACKED), y))  # 2^(G_last - G)
    k = k.to(tl.float32)
    tl.store(kg_ptr + at, (k * e).to(dtype))
    e = tl.exp2(tl.dot(half_like(j <= i, X, PACKED), y))  # 2^G
    q = q.to(tl.float32)
    if SCALE != 1.0:
        q = q * SCALE
    qg = q * e
    tl.store(qg_ptr + at, qg.to(dtype))
    w = tl.dot(X, (k * e).to(X.dtype))
    tl.store(w_ptr + at, w.to(dtype))
