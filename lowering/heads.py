"""The queries, keys and values that are cut out of one packed tensor: what the rewrites of the
convolution operators have in common.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kda_ops.l2norm.op import l2norm_op
from lowering.rewrite import Call, moved, only_user, same_shape, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Heads:
    """The three parts of a packed tensor and what follows each of them.

    Attributes:
        inner: Nodes from the packed tensor to the parts and the norms, both included.
        parts: The parts of q, k and v.
        norms: The `Call` of `l2norm` for q and for k, None where something else follows.
        key_dim: Channels of q and of k.
    """

    inner: list[fx.Node]
    parts: list[fx.Node]
    norms: list[Any]
    key_dim: int

    @property
    def head_dim(self) -> int:
        return value(self.norms[0].node).shape[-1]

    @property
    def norm_eps(self) -> float:
        return self.norms[0].args["eps"]

    def guard(self) -> str | None:
        """Why the parts are not normalised queries, normalised keys and values."""
        for name, part, norm in zip("qk", self.parts, self.norms, strict=False):
            if norm is None:
                return f"{name} ({part.name}) does not go into l2norm alone"
            if not same_shape([value(norm.node).shape[-1]], [self.head_dim]):
                return "the heads of q and k have different widths"
            if norm.args["eps"] != self.norm_eps:
                return f"q and k have different eps: {self.norm_eps} and {norm.args['eps']}"
        if self.key_dim % self.head_dim:
            return f"the {self.key_dim} channels of q are not whole heads of {self.head_dim}"
        return None


def heads_of(packed: fx.Node) -> Heads | None:
    """The parts that `[..., D]` is cut into along its last axis, if they are q, k and v."""
    path = moved(packed)
    D = value(packed).shape[-1]
    if not isinstance(D, int) or value(path[-1]).shape[-1] != D:
        return None
    cuts, parts = channels(path[-1])
    edges = [edge for edge, _ in parts]
    if len(parts) != 3:
        return None
    (q0, q1), (k0, k1), (v0, v1) = edges
    if (q0, q1, k1, v0, v1) != (0, k0, 2 * q1, k1, D):
        return None
    nodes = [node for _, node in parts]
    norms: list[Call | None] = []
    inner = [*path, *cuts, *nodes]
    for part in nodes[:2]:
        *moves, last = moved(part)
        norm = Call.of(only_user(last))
        if norm is not None and norm.op is l2norm_op:
            inner += [*moves[1:], last, norm.node] if moves else [norm.node]
            norms.append(norm)
        else:
            norms.append(None)
    return Heads(list(dict.fromkeys(inner)), nodes, norms, q1)


def channels(x: fx.Node) -> tuple[list[fx.Node], list[tuple[tuple[int, int], fx.Node]]]:
    """The nodes that cut `x` along its last axis, and `((start, stop), node)` of the pieces."""
    cuts: list[fx.Node] = []
    pieces: list[tuple[tuple[int, int], Any]] = []
    rank, D = value(x).dim(), value(x).shape[-1]
    for user in x.users:
        if user.target in (aten.split_with_sizes.default, aten.split.Tensor):
            if axis_of(user, rank) != rank - 1:
                continue
            cuts.append(user)
            widths = [piece.shape[-1] for piece in value(user)]
            for piece in user.users:
                start = sum(widths[: piece.args[1]])
                pieces.append(((start, start + widths[piece.args[1]]), piece))
        elif user.target is aten.slice.Tensor and axis_of(user, rank, 1) == rank - 1:
            start, stop = (*user.args[2:4], None, None)[:2] if len(user.args) > 2 else (0, None)
            step = user.args[4] if len(user.args) > 4 else 1
            start, stop = start or 0, D if stop is None else stop
            if step == 1 and all(isinstance(edge, int) for edge in (start, stop)):
                start, stop = (edge + D if edge < 0 else min(edge, D) for edge in (start, stop))
                pieces.append(((start, stop), user))
    return cuts, sorted(pieces, key=lambda piece: piece[0])


def axis_of(node: fx.Node, rank: int, position: int = 2) -> int:
    """The axis argument of a node, counted from the front."""
    return (node.args[position] if len(node.args) > position else 0) % rank
