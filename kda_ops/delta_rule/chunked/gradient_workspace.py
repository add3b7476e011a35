"""The workspace of the gradient of chunked KDA, between its kernels.

One row per (chunk, value head), as in `kda_ops.delta_rule.chunked.workspace`: tiles w, kg, qg [64,
K], Aqk and T [64, 64], u and then vn [64, V]; vectors in fp32 (`gradient_rows_of`); and two states
[K, V], S before the chunk and its gradient after it. 150,528 bytes with 128 x 128 in bf16, 621 MB
at T = 8192 and 32 heads. The tiles of `backward_tiles_kernel` reuse the memory that the scans have
read.

Above `GRADIENT_BYTES` it is processed in slabs, from the last to the first, after the forward
recurrence has run through all but the last: a slab starts from the state that this pass left,
`[slabs + 1, HV, K, V]`, one per boundary, since at most one sequence crosses it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kda_ops._numerics import CHUNK
from kda_ops.delta_rule.chunked.workspace import Batch, shared_memory, workspace_rows
from kda_ops.tuning.example_inputs import NoHintError, hint

# limit of the workspace, unless one chunk of all heads needs more
GRADIENT_BYTES = 768_000_000


class GradientWorkspace(NamedTuple):
    """In the order of the kernels' arguments; `boundaries`: states passed between slabs, and their
    gradients, None with one slab.
    """

    tiles: Tensor
    rows: Tensor
    states: Tensor
    boundaries: Tensor | None

    @property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of every kernel but the first."""
        return self[:3]

    def handed_on(self, slab: int) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """The states, and their gradients, before and after a slab."""
        if self.boundaries is None:
            return (None, None), (None, None)
        states, gradients = self.boundaries
        return (states[slab], states[slab + 1]), (gradients[slab], gradients[slab + 1])


def gradient_row(K: int, V: int, dtype: torch.dtype) -> dict[str, tuple[Any, torch.dtype]]:
    """Shapes and dtypes of the workspace of one chunk of one head."""
    return {
        "tiles": ((CHUNK * (3 * K + V + 2 * CHUNK),), dtype),
        "rows": ((K + 10 * CHUNK,), torch.float32),
        "states": ((2, K, V), dtype),
    }


def gradient_slabs(batch: Batch, q: Tensor, v: Tensor, row: dict[str, Any]) -> list[Batch]:
    """Splits the batch into parts whose workspace is not too large."""
    rows = workspace_rows(q.shape[0] * batch.T, batch.N)
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in row.values())
    try:
        known = hint(rows)
    except NoHintError:
        known = 0
    most = max(GRADIENT_BYTES // (v.shape[2] * size), 1)
    return batch.split(rows, max(-(-known // most), 1))


def make_gradient_workspace(
    q: Tensor, v: Tensor, parts: list[Batch], row: dict[str, Any]
) -> GradientWorkspace:
    """A workspace for any part of a batch."""
    batch = parts[0]
    rows = workspace_rows(q.shape[0] * batch.T, batch.N) if batch.slab is None else batch.slab[1]
    (K, V), HV = row["states"][0][1:], v.shape[2]

    def make(shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    made = {name: make((rows, HV, *shape), dtype) for name, (shape, dtype) in row.items()}
    boundaries = None
    if batch.slab is not None:
        boundaries = make((2, len(parts) + 1, HV, K, V), torch.float32)
    return GradientWorkspace(made["tiles"], made["rows"], made["states"], boundaries)


def reverse_stages(K: int, BV: int, device: torch.device) -> int:
    """Pipeline stages of the reverse scan: chunks whose tiles are in shared memory at a time."""
    chunk = 2 * CHUNK * (3 * K + 2 * CHUNK + BV) + 4 * (K + CHUNK)
    operands = 2 * BV * (K + CHUNK)
    for depth in (3, 2):
        if depth * chunk + operands <= shared_memory(device):
            return depth
    return 1


def forward_stages(K: int, BV: int, device: torch.device) -> int:
    """Pipeline stages of the forward scan."""
    chunk = 2 * CHUNK * (2 * K + BV) + 4 * K
    operands = 2 * BV * (K + CHUNK)
    for depth in (4, 3, 2):
        if depth * chunk + operands <= shared_memory(device):
            return depth
    return 1
