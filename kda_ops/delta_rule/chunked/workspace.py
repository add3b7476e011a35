"""The memory between `prepare` and `scan`, the kernels of chunked KDA.

It has one row per (chunk, value head): the contiguous tiles `w`, `kg`, `qg [64, K]` and `Aqk [64,
64]`, `u [64, V]` and the chunk's decay `[K]`. The row of chunk c of sequence n is `cu_seqlens[n] //
64 + n + c`, which needs no table, is unique and below `T // 64 + N`. bf16 `u` needs no memory of
its own: it is as large as the output and is stored there until `scan` overwrites it.

One tensor holds all tiles: an allocation takes the host a few microseconds, which matters for few
tokens.

A workspace that would be too large (`workspace_slabs`) holds one slab of the rows at a time: all
kernels run once per slab, and fp32 states `S [N, HV, K, V]` are carried from one to the next.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK
from kda_ops.tuning.example_inputs import NoHintError, hint


class Batch(NamedTuple):
    """The sequences and chunks of a launch.

    Attributes:
        T: Tokens per batch row.
        N: Sequences.
        NC: Rows of the chunk table, or programs per batch row.
        programs: Programs of `prepare`.
        cu_seqlens: As passed.
        chunk_indices: As passed.
        slab: First row and number of rows of the workspace's slab; None if it holds all.
    """

    T: int
    N: int
    NC: int
    programs: int
    cu_seqlens: Tensor | None
    chunk_indices: Tensor | None
    slab: tuple[int, int] | None = None

    @staticmethod
    def of(q: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> "Batch":
        B, T = q.shape[:2]
        if cu_seqlens is None:
            NC = T // CHUNK + 1
            return Batch(T, B, NC, B * NC, None, None)
        if chunk_indices is None:
            raise ValueError("chunk_indices must be given with cu_seqlens, got None")
        NC = chunk_indices.shape[0]
        # T // 64 + N + 1 blocks of 64 rows cover the padding too
        return Batch(
            T, cu_seqlens.shape[0] - 1, NC, NC + 1, cu_seqlens.contiguous(),
            chunk_indices.contiguous(),
        )  # fmt: skip

    def slabs(self, q: Tensor, v: Tensor) -> list["Batch"]:
        """Splits this batch into parts whose workspace is not too large.

        A compiled graph has a fixed number of launches: a symbolic number of rows counts as its
        hint, or as small without one.
        """
        rows = workspace_rows(q.shape[0] * self.T, self.N)
        try:
            known = hint(rows)
        except NoHintError:
            known = 0
        return self.split(rows, workspace_slabs(known, v.shape[2], q.shape[3], v.shape[3], q.dtype))

    def split(self, rows: Any, count: int) -> list["Batch"]:
        """This batch of `rows` rows in `count` slabs of equal size."""
        if count == 1:
            return [self]
        size = (rows + count - 1) // count
        # see `slab_rows`; one more program for the padding after the last row
        part = self._replace(programs=size + self.N + 1)
        return [part._replace(slab=(i * size, size)) for i in range(count)]

    @property
    def tables(self) -> tuple[Any, ...]:
        """The batch arguments of every `prepare`, in order."""
        return self.cu_seqlens, self.chunk_indices, self.T, self.N, self.NC, *(self.slab or (0, 0))

    @property
    def sequences(self) -> tuple[Any, ...]:
        """The batch arguments of every scan, in order."""
        return self.cu_seqlens, self.T, self.N, *(self.slab or (0, 0))

    @property
    def constants(self) -> dict[str, bool]:
        return {"VARLEN": self.cu_seqlens is not None, "SLABS": self.slab is not None}


class Workspace(NamedTuple):
    """What `prepare` writes and `scan` reads, in the order of their arguments, and the states that
    `scan` keeps in memory.

    `u` is None if it is stored in the output, `S` if states stay in registers.
    """

    tiles: Tensor
    u: Tensor | None
    decay: Tensor
    S: Tensor | None

    @property
    def prepared(self) -> tuple[Tensor | None, ...]:
        """The arguments of `prepare`."""
        return self[:3]

    @property
    def columns(self) -> int:
        """K, padded as in the tiles."""
        return int(self.decay.shape[2])


Prepare = Callable[[Tensor, Workspace, Batch], None]  # the output, the workspace, what is in it


def make_workspace(q: Tensor, v: Tensor, batch: Batch) -> Workspace:
    """A workspace for a batch, or for any slab of one."""
    rows = workspace_rows(q.shape[0] * batch.T, batch.N) if batch.slab is None else batch.slab[1]
    HV, V = v.shape[2:]

    def make(first: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((first, HV, *shape), dtype=dtype, device=q.device)

    row = workspace_row(q.shape[3], V, q.dtype)
    parts = {name: make(rows, *part) for name, part in row.items()}
    S = None
    if batch.slab is not None or q.dtype == torch.float32:
        S = make(at_least_one(batch.N), (*row["decay"][0], V), torch.float32)
    return Workspace(parts["tiles"], parts.get("u"), parts["decay"], S)


def has_fast_prepare(dtype: torch.dtype, K: Any, V: Any) -> bool:
    """Whether a chunk of a head fits one program; else the general `prepare` is used."""
    return dtype != torch.float32 and K in (64, 128) and V in (64, 128)


def programs_key(programs: Any) -> int:
    """The key of a scan's tuned values: at most 16 programs per block of columns, 32, or more."""
    if not isinstance(programs, int):
        return 64  # a symbolic number of sequences: assume a large batch
    return 16 if programs <= 16 else 32 if programs <= 32 else 64


def at_least_one(sequences: Any) -> Any:
    """At least 1: GPUs do not launch an empty grid."""
    return torch.sym_max(sequences, 1)


def dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied if their last stride is not 1 or an offset within a chunk exceeds 32
    bits.
    """
    tensors = tuple(x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return tuple(x if x.stride(1) < 1 << 25 else x.contiguous() for x in tensors)


def token_strides(*tensors: Tensor) -> list[Any]:
    """Strides of each tensor for batch, tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per program; 64 KB, which every GPU has, if unknown."""
    if device.type != "cuda":
        return 64 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def stages(columns: int, KP: int, BV: int, u_bytes: int, device: torch.device) -> int:
    """Pipeline stages of a program that carries BV columns of a state: chunks whose tiles are in
    shared memory at a time, 1 for no pipelining; `columns` is the total of its 16-bit tiles [64,
    n].
    """
    products = 2 * BV * (KP + CHUNK)  # S and vn as operands
    for depth in (3, 2):
        tiles = depth * 2 * CHUNK * columns + (depth - 1) * (CHUNK * BV * u_bytes + 4 * KP)
        if tiles + products <= shared_memory(device):
            return depth
    return 1


# limit for the tiles of chunked KDA, unless one chunk of all heads needs more
WORKSPACE_BYTES = 256_000_000


def workspace_bytes(
    total_tokens: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    *,
    sequences: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of temporary GPU memory of `chunk_kda`, besides its inputs and results.

    `chunk_kda_gated` uses the same if K and V are 64 or 128 in 16 bits; at other sizes it also
    stores the cumulative gate, `[B, T, HV, K]` in fp32, and normalized q and k. If few heads are
    scanned in segments, each segment adds a state in fp32 and a K x K matrix in fp16, below 10 MB
    in total on a GPU with 132 multiprocessors and not counted here. In 16 bits with 128 x 128 a
    chunk of a head takes 57,856 bytes in bf16 (90,624 in fp16), 239 MB at T = 8192 and 32 heads.
    Above `WORKSPACE_BYTES` it is processed in slabs, one after the other.

    Args:
        total_tokens: `B * T`.
        num_v_heads: HV.
        head_k_dim: K.
        head_v_dim: V.
        sequences: N: the batch size, or `len(cu_seqlens) - 1`.
        dtype: Dtype of q, k and v: fp16, bf16 or fp32.
    """
    sizes = (num_v_heads, head_k_dim, head_v_dim, dtype)
    rows = workspace_rows(total_tokens, sequences)
    slabs = workspace_slabs(rows, *sizes)
    states = 0
    if slabs > 1 or dtype == torch.float32:
        (columns,), _ = workspace_row(head_k_dim, head_v_dim, dtype)["decay"]
        states = 4 * max(sequences, 1) * num_v_heads * columns * head_v_dim
    return -(-rows // slabs) * _row_bytes(*sizes) + states


def workspace_row(
    K: int, V: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the workspace of one chunk of one head."""
    KP = max(32 if dtype == torch.float32 else 16, 1 << (K - 1).bit_length())
    row: dict[str, tuple[tuple[int, ...], torch.dtype]]
    row = {"tiles": ((CHUNK * (3 * KP + CHUNK),), dtype)}
    if dtype != torch.bfloat16:
        # sums of 64 values may overflow fp16; in bf16 they are stored in the output
        row["u"] = ((CHUNK, V), torch.float32)
    return row | {"decay": ((KP,), torch.float32)}


def workspace_rows(total_tokens: Any, sequences: Any) -> Any:
    """Rows of the workspace, one per chunk: the most there can be."""
    return total_tokens // CHUNK + sequences


def workspace_slabs(rows: int, HV: int, K: int, V: int, dtype: torch.dtype) -> int:
    """The number of equal slabs in which that many rows are processed."""
    most = max(WORKSPACE_BYTES // _row_bytes(HV, K, V, dtype), 1)
    return max(-(-rows // most), 1)


def _row_bytes(HV: int, K: int, V: int, dtype: torch.dtype) -> int:
    parts = workspace_row(K, V, dtype).values()
    return HV * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
