"""The ranks that share the tokens of a sequence, and what a part of it needs of those before it.

The tokens are cut into equal parts, one per rank or, in zig-zag order, two. The numbers of a rank's
parts are a tensor, so that all ranks run the same graph: their compilers take the same decisions,
and no rank drops a collective whose result it does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PARTS_PER_RANK = {"contiguous": 1, "zigzag": 2}


def check_mesh(name: str, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got {mesh.ndim}: take one of them by its name"
        )


class Ranks(NamedTuple):
    """The constants of a context's collectives.

    Attributes:
        group: Name of the process group.
        size: Ranks in it.
        parts: Parts per rank.
    """

    group: str
    size: int
    parts: int

    def gather(self, x: Tensor) -> Tensor:
        """`[parts, ...]` of every rank as `[all parts, ...]`, those of rank 0 first."""
        # as operators: the names of the functions around them differ between versions
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), self.size, self.group))

    def places(self) -> list[int]:
        """Where each part is in what `gather` returns, in the order of the tokens."""
        if self.parts == 1:
            return list(range(self.size))
        return [2 * r for r in range(self.size)] + [2 * r + 1 for r in reversed(range(self.size))]

    def place(self, part: Tensor) -> Tensor:
        """`places()[part]`, for a tensor of parts."""
        if self.parts == 1:
            return part
        mirrored = 2 * self.size - 1 - part
        return 2 * torch.minimum(part, mirrored) + (part > mirrored)


class ContextParallel:
    """Splits sequences over the ranks of a mesh: context parallelism, for long sequences.

    With n ranks the tokens are cut into equal parts: n in order `"contiguous"`, of which rank r has
    part r, or 2 n in order `"zigzag"`, of which it has parts r and 2 n - 1 - r, which balances
    causal attention in hybrid models. To KDA the order makes no difference.

    Args:
        mesh: One dimension, the ranks; `mesh["cp"]` of a larger one.
        order: `"contiguous"` or `"zigzag"`.

    Attributes:
        own: The numbers of this rank's parts, int64.

    Raises:
        ValueError: Another order, or a mesh of more than one dimension.
    """

    def __init__(self, mesh: DeviceMesh, order: str = "contiguous") -> None:
        check_mesh("mesh", mesh)
        if order not in PARTS_PER_RANK:
            raise ValueError(f"order must be one of {sorted(PARTS_PER_RANK)}, got {order!r}")
        self.mesh, self.order = mesh, order
        self.ranks = Ranks(mesh.get_group().group_name, mesh.size(), PARTS_PER_RANK[order])
        rank = mesh.get_local_rank()
        self.parts = [rank, 2 * mesh.size() - 1 - rank][: self.ranks.parts]
        self.own = torch.tensor(self.parts, device=mesh.device_type)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ranks={self.ranks.size}, order={self.order!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        return self  # as its process group

    def shard(self, x: Tensor, *, dim: int = 1, fill: float = 0) -> Tensor:
        """This rank's tokens of what all ranks have.

        Args:
            x: Any shape, with T tokens along `dim`: hidden states, token ids, labels, positions.
            dim: The axis of the tokens.
            fill: The value of the padding at the end, where the parts do not divide T (for labels
                the index that the loss ignores).

        Returns:
            Like `x`, with `parts per rank * ceil(T / all parts)` tokens, of the parts one after
            another.
        """
        parts = self.ranks.size * self.ranks.parts
        size = -(-x.shape[dim] // parts)
        behind = x.dim() - 1 - dim % x.dim()
        x = F.pad(x, (0, 0) * behind + (0, size * parts - x.shape[dim]), value=fill)
        return torch.cat([x.narrow(dim, part * size, size) for part in self.parts], dim)

    def gather(self, x: Tensor, *, dim: int = 1, tokens: int | None = None) -> Tensor:
        """The tokens of all ranks, in order, on every rank. A collective, without a gradient.

        Args:
            x: What `shard` returns, or something computed from it, with this rank's tokens along
                `dim`.
            dim: The axis of the tokens.
            tokens: T, to leave out the padding.

        Returns:
            Like `x`, with T tokens.

        Raises:
            RuntimeError: `x` requires grad, and grad mode is on.
            ValueError: The parts of the rank do not divide its tokens.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("gather has no gradient: detach x, or call it under torch.no_grad()")
        self.check_tokens("x", x, dim)
        size = x.shape[dim] // self.ranks.parts
        parts = self.ranks.gather(x.movedim(dim, 0).unflatten(0, (self.ranks.parts, size)))
        whole = torch.cat([parts[place] for place in self.ranks.places()]).movedim(0, dim)
        return whole if tokens is None else whole.narrow(dim, 0, tokens)

    def check_tokens(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Whether a rank's tokens are as many in each of its parts, and not none."""
        if x.shape[dim] < 1 or x.shape[dim] % self.ranks.parts:
            raise ValueError(
                f"{name} must have a multiple of {self.ranks.parts} tokens, at least one per part "
                f"of this rank, got {x.shape[dim]}"
            )


class Packed(NamedTuple):
    """Where packed sequences begin and end, as a rank's parts see it.

    Tables `[m, N]` are bools by part of this rank and sequence. Sequences of a rank are those of
    its first part, then those of its second, N of each, most of them empty.

    Attributes:
        cu_seqlens: `[m N + 1]`, offsets of the rank's sequences in its tokens.
        enters: The sequence goes on from the part before.
        leaves: It goes on in the part behind.
        begins: Its first token is here (of an empty one, its place).
        ends: Its last token is here, likewise.
        last: It has the last real token of the part.
        start: `[m]`, the global token at which the sequence that enters begins; where none does,
            the part's first.
        stop: `[m]`, the token behind that sequence, likewise.
    """

    cu_seqlens: Tensor
    enters: Tensor
    leaves: Tensor
    begins: Tensor
    ends: Tensor
    last: Tensor
    start: Tensor
    stop: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, own: Tensor, size: Any, parts: int) -> Packed:
        """Of the global offsets, for parts of `size` tokens, of which there are `parts`."""
        cu = cu_seqlens.long()
        first, behind = cu[None, :-1], cu[None, 1:]  # [1, N]
        a = (own * size)[:, None]  # [m, 1]
        b = a + size
        end = torch.minimum(torch.maximum(cu[-1:], a), b)  # of the real tokens
        enters = (first < a) & (a < behind)
        inside = torch.minimum(torch.maximum(cu[None], a), b) - a  # [m, N + 1]
        before = F.pad(inside[:-1, -1:].cumsum(0), (0, 0, 1, 0))  # real tokens of parts before
        offsets = inside + before
        last = (first < end) & (end <= behind) & (end > a)
        # a sequence that is empty at the end of all tokens is in the last part
        home = (first // size).clamp(max=parts - 1)
        final = (torch.maximum(behind - 1, first) // size).clamp(max=parts - 1)
        return Packed(
            F.pad(offsets[:, 1:].flatten(), (1, 0)).to(cu_seqlens.dtype),
            enters,
            (first < b) & (b < behind),
            home == own[:, None],
            final == own[:, None],
            last,
            torch.where(enters, first, 0).sum(1) + torch.where(enters.any(1), 0, a[:, 0]),
            torch.where(enters, behind, 0).sum(1) + torch.where(enters.any(1), 0, a[:, 0]),
        )


class History(Function):
    """The rows before each part, from the ranks that have them: one all-gather of every part's last
    rows, and one of their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, start: Tensor, rows: int, ranks: Ranks) -> Tensor:
        """Of `x [B, m, size, D]` the `rows` before each part, `[B, m, rows, D]`; zero before token
        `start [m]`.
        """
        size = x.shape[2]
        kept = rows if size >= rows else size
        tails = ranks.gather(x[:, :, size - kept :].permute(1, 2, 0, 3))  # [parts, kept, B, D]
        token = tokens_before(own, size, rows)
        real = token >= start[:, None]
        part = torch.where(real, token, 0) // size
        place = ranks.place(part) * kept + torch.where(real, token - part * size - size + kept, 0)
        found = tails.flatten(0, 1)[place]  # [m, rows, B, D]
        ctx.save_for_backward(own, real)
        ctx.size, ctx.kept, ctx.rows, ctx.ranks = size, kept, rows, ranks
        found = torch.where(real[:, :, None, None], found, 0).permute(2, 0, 1, 3)
        # always a copy: torch 2.11 loses the gradient of what `contiguous` returns as it is
        return found.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, real = ctx.saved_tensors
        size, kept, rows, ranks = ctx.size, ctx.kept, ctx.rows, ctx.ranks
        gradient = torch.where(real[:, :, None, None], gradient.permute(1, 2, 0, 3), 0)
        everyone = ranks.gather(gradient).flatten(0, 1)
        last = ranks.size * ranks.parts - 1
        token = tokens_before(own + 1, size, kept)
        found = None
        # a short part is part of the history of several
        for distance in range(1, 2 if size >= rows else -(-rows // size) + 1):
            part = (own + distance)[:, None]
            row = token - part * size + rows
            needed = (part <= last) & (row >= 0)
            place = ranks.place(part.clamp(max=last)) * rows + row.clamp(min=0)
            term = torch.where(needed[:, :, None, None], everyone[place], 0)
            found = term if found is None else found + term
        assert found is not None
        found = F.pad(found.permute(2, 0, 1, 3), (0, 0, size - kept, 0))
        return found, None, None, None, None


def tokens_before(part: Tensor, size: Any, rows: int) -> Tensor:
    """The `rows` global tokens before each part, `[parts, rows]`."""
    return (part * size - rows)[:, None] + torch.arange(rows, device=part.device)
