"""The workspace of the gradient of chunked KDA, between its kernels.

One row per (chunk, value head), as in `kda_ops.delta_rule.chunked.workspace`: tiles w, kg, qg [64,
K], Aqk and T [64, 64], u and then vn [64, V]; vectors in fp32 (`gradient_rows_of`, `parts_of`); the
states [K, V] before the chunk, and their gradients after it. 153,088 bytes with 128 x 128 in bf16,
630 MB at T = 8192 and 32 heads. The tiles of `backward_tiles_kernel` reuse the memory that the
scans have read.

Above `GRADIENT_BYTES` it is processed in slabs, from the last to the first, after the forward
recurrence has run through all but the last: a slab starts from the state that this pass left,
`[slabs + 1, HV, K, V]`, one per boundary, since at most one sequence crosses it.

Tiles, rows and states may be `Saved` by the forward: 118,016 bytes. They are only read then, and
the tiles of `backward_tiles_kernel` have memory of their own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.workspace import Batch, shared_memory, workspace_rows
from kda_ops.tuning.example_inputs import NoHintError, hint

# limit of the workspace, unless one chunk of all heads needs more
GRADIENT_BYTES = 768_000_000
PAIRS = 16384  # numbers of the tiles of `backward_tiles_kernel` of one chunk


class Saved(NamedTuple):
    """What a forward saves for its gradient; see the rows of `gradient_row`."""

    tiles: Tensor
    rows: Tensor
    states: Tensor


class GradientWorkspace(NamedTuple):
    tiles: Tensor
    rows: Tensor
    states: Tensor
    dstates: Tensor
    pairs: Tensor
    parts: Tensor


Row = dict[str, tuple[Any, torch.dtype]]


def gradient_row(K: int, V: int, dtype: torch.dtype) -> Row:
    """Shapes and dtypes of the workspace of one chunk of one head, without `pairs`."""
    return saved_row(K, V, dtype) | {
        "dstates": ((K, V), dtype),
        "parts": ((9 * CHUNK,), torch.float32),
    }


def saved_row(K: int, V: int, dtype: torch.dtype) -> Row:
    """Shapes and dtypes of what is `Saved` of one chunk of one head."""
    return {
        "tiles": ((CHUNK * (3 * K + V + 2 * CHUNK),), dtype),
        "rows": ((5 * K + 3 * CHUNK,), torch.float32),
        "states": ((K, V), dtype),
    }


def has_fast_gradient(dtype: torch.dtype, K: Any, V: Any) -> bool:
    """Whether the fast form supports it; else the general one does."""
    return dtype == torch.bfloat16 and K in (64, 128) and V in (64, 128)


def saved_fake(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """What a forward saves."""
    row = saved_row(q.shape[3], v.shape[3], q.dtype)
    rows = workspace_rows(q.shape[0] * q.shape[1], _sequences(q, cu_seqlens))
    return tuple(empty_rows(rows, v.shape[2], row, q.device).values())


def saved_size(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> int | None:
    """Its bytes; None without the fast form, or if they are not known."""
    K, V = q.shape[3], v.shape[3]
    if not has_fast_gradient(q.dtype, K, V):
        return None
    try:
        rows = hint(workspace_rows(q.shape[0] * q.shape[1], _sequences(q, cu_seqlens)))
    except NoHintError:
        return None
    return rows * v.shape[2] * row_bytes(saved_row(K, V, q.dtype))


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> Any:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def empty_rows(rows: Any, HV: Any, row: Row, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.empty((rows, HV, *shape), dtype=dtype, device=device)
        for name, (shape, dtype) in row.items()
    }


def row_bytes(row: Row) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in row.values())


def gradient_slabs(batch: Batch, q: Tensor, v: Tensor, row: Row) -> list[Batch]:
    """Splits the batch into parts whose workspace is not too large."""
    rows = workspace_rows(q.shape[0] * batch.T, batch.N)
    try:
        known = hint(rows)
    except NoHintError:
        known = 0
    most = max(GRADIENT_BYTES // (v.shape[2] * row_bytes(row)), 1)
    return batch.split(rows, max(-(-known // most), 1))


def make_rows(q: Tensor, v: Tensor, parts: list[Batch], row: Row) -> dict[str, Tensor]:
    """Uninitialized memory `[rows, HV, ...]` for any part of a batch, for every entry of a row."""
    batch = parts[0]
    rows = workspace_rows(q.shape[0] * batch.T, batch.N) if batch.slab is None else batch.slab[1]
    return empty_rows(rows, v.shape[2], row, q.device)


def make_gradient_workspace(
    q: Tensor, v: Tensor, parts: list[Batch], saved: Saved | None
) -> GradientWorkspace:
    """A workspace for any part of a batch, around what the forward has saved."""
    row = gradient_row(q.shape[3], v.shape[3], q.dtype)
    if saved is None:
        made = make_rows(q, v, parts, row)
        return GradientWorkspace(**made, pairs=made["tiles"])
    row = {name: x for name, x in row.items() if name not in Saved._fields}
    row["pairs"] = ((PAIRS,), q.dtype)
    return GradientWorkspace(*saved, **make_rows(q, v, parts, row))


class Boundaries:
    """The states passed between slabs, and their gradients."""

    def __init__(self, parts: list[Batch], HV: Any, K: Any, V: Any, device: torch.device) -> None:
        self.memory = None
        if parts[0].slab is not None:
            shape = (2, len(parts) + 1, HV, K, V)
            self.memory = torch.empty(shape, dtype=torch.float32, device=device)

    def around(self, slab: int) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """The states, and their gradients, before and after a slab."""
        if self.memory is None:
            return (None, None), (None, None)
        states, gradients = self.memory
        return (states[slab], states[slab + 1]), (gradients[slab], gradients[slab + 1])


def reverse_stages(K: int, BV: int, output: bool, device: torch.device) -> int:
    """Pipeline stages of the reverse scan, chunks whose tiles are in shared memory at a time; it
    may also compute its `output`, the gradient of v.
    """
    chunk = 2 * CHUNK * (3 * K + CHUNK + BV + output * CHUNK) + 4 * (K + output * CHUNK)
    operands = 2 * BV * (K + CHUNK)
    for depth in (3, 2):
        if depth * chunk + operands <= shared_memory(device):
            return depth
    return 1


def forward_stages(K: int, BV: int, output: bool, device: torch.device) -> int:
    """Pipeline stages of the forward scan, which may also compute the output."""
    chunk = 2 * CHUNK * (2 * K + BV + output * (K + CHUNK)) + 4 * K
    operands = 2 * BV * (K + CHUNK)
    for depth in (4, 3, 2):
        if depth * chunk + operands <= shared_memory(device):
            return depth
    return 1
