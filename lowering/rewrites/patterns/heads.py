"""The queries, keys and values that a convolution of all of them is cut into, or that come out of
one convolution each: what the rewrites of the convolution operators have in common.
"""

import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kda_ops._checks import MAX_HEAD_DIM
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    follow_views,
    only_user,
    same,
    same_shape,
    value,
)
from kda_ops.norm.l2norm.op import l2norm_op

aten = torch.ops.aten
PER_PART = ("x", "weight", "bias", "conv_state")


@dataclass(frozen=True)
class Heads:
    """The convolved q, k and v and what follows each of them.

    Attributes:
        inner: Nodes from the results of the convolutions to the parts and the norms, all included.
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

    def guard(self) -> Refusal | None:
        """Why the parts are not normalised queries, normalised keys and values."""
        for name, part, norm in zip("qk", self.parts, self.norms, strict=False):
            if norm is None:
                return Refusal(f"{name} ({part.name}) does not go into l2norm alone", part)
            if not same_shape([value(norm.node).shape[-1]], [self.head_dim]):
                return Refusal("the heads of q and k have different widths")
            if norm.args["eps"] != self.norm_eps:
                eps = f"{self.norm_eps} and {norm.args['eps']}"
                return Refusal(f"q and k have different eps: {eps}")
        if not same_shape(value(self.parts[1]).shape[-1:], [self.key_dim]):
            return Refusal("q and k have different numbers of channels")
        if self.head_dim > MAX_HEAD_DIM:
            return Refusal(f"heads of {self.head_dim} are wider than {MAX_HEAD_DIM}")
        if self.key_dim % self.head_dim:
            return Refusal(
                f"the {self.key_dim} channels of q are not whole heads of {self.head_dim}"
            )
        return None


def heads_of(packed: fx.Node) -> Heads | None:
    """The parts that `[..., D]` is cut into along its last axis, if they are q, k and v."""
    path = follow_views(packed)
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
    return with_norms([*path, *cuts], [node for _, node in parts], q1)


def separate_heads(convs: list[Call]) -> Heads | None:
    """The results of one convolution each for q, k and v."""
    parts = [conv.result() for conv in convs]
    if None in parts:
        return None
    inner = [node for conv in convs for node in conv.nodes()]
    return with_norms(inner, parts, value(parts[0]).shape[-1])


def with_norms(inner: list[fx.Node], parts: list[Any], key_dim: int) -> Heads:
    """The heads of three parts, with the norms of the first two."""
    norms: list[Call | None] = []
    inner = [*inner, *parts]
    for part in parts[:2]:
        *views, last = follow_views(part)
        norm = Call.of(only_user(last))
        if norm is not None and norm.op is l2norm_op:
            inner += [*views[1:], last, norm.node] if views else [norm.node]
            norms.append(norm)
        else:
            norms.append(None)
    return Heads(list(dict.fromkeys(inner)), parts, norms, key_dim)


def convolution_under(x: Any, ops: tuple[Any, ...]) -> Call | None:
    """The convolution that queries, keys or values come from, whatever is done to them."""
    while isinstance(x, fx.Node) and x.op == "call_function":
        call = Call.of(x)
        if call is not None and call.op in ops:
            return call
        if call is not None and call.op is not l2norm_op:
            return None
        x = x.args[0] if x.args else None
    return None


def convolutions_under(call: Call, ops: tuple[Any, ...]) -> list[Call]:
    """The convolutions behind the q, k and v of an operator: one, three in their order, or none."""
    convs = [convolution_under(call.args[name], ops) for name in "qkv"]
    found = {conv.node: conv for conv in convs if conv is not None}
    return list(found.values()) if None not in convs and len(found) != 2 else []


def unlike(convs: list[Call]) -> Refusal | None:
    """Why the convolutions of q, k and v are not parts of one."""
    q, *others = convs

    def refused(conv: Call, why: str) -> Refusal:
        return Refusal(f"{q.node.name} and {conv.node.name} {why}", conv.node)

    states = [conv.view("conv_state") for conv in convs if "conv_state" in conv.args]
    for conv in others:
        if conv.op is not q.op:
            return refused(conv, "are different operators")
        for name, theirs in conv.args.items():
            ours = q.args.get(name)
            if name in PER_PART or name.startswith("_"):
                continue
            if not same(ours, theirs):
                return refused(conv, f"have other {name}")
        x, weight = (value(q.args[name]) for name in ("x", "weight"))
        other_x, other_weight = (value(conv.args[name]) for name in ("x", "weight"))
        if not same_shape(x.shape[:-1], other_x.shape[:-1]) or x.dtype != other_x.dtype:
            return refused(conv, "convolve other tokens")
        if weight.shape[1:] != other_weight.shape[1:] or weight.dtype != other_weight.dtype:
            return refused(conv, "have different taps")
        biases = [value(c.args["bias"]) for c in (q, conv)]
        if len({None if bias is None else bias.dtype for bias in biases}) > 1:
            return refused(conv, "have different biases")
    if not states:
        return None
    pairs = itertools.combinations(zip(map(root_of_state, convs), states, strict=True), 2)
    if not all(a is not b or disjoint(x, y) or disjoint(y, x) for (a, x), (b, y) in pairs):
        return Refusal("two of q, k and v have one state, or parts of it in common")
    return unlike_states(q.args["layout"], states)


def root_of_state(conv: Call) -> fx.Node:
    """The tensor that a state is a part of, before any operator has written it."""
    base = conv.args["conv_state"]
    while base.target is operator.getitem and (writer := Call.of(base.args[0])) is not None:
        base = writer.bases()[base.args[1] - writer.results]
    return base


def disjoint(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two views of one memory provably have no element in common, `y` starting later.

    So it is if `y` lies behind `x` within one step of some outer axes that both go through alike.
    """
    ahead = y.storage_offset() - x.storage_offset()
    for axes, count in itertools.product(itertools.permutations(range(x.dim())), range(x.dim())):
        steps, inner = axes[:count], axes[count:]
        strides = [[(z.stride(i), z.shape[i]) for i in steps] for z in (x, y)]
        if not all(same_shape(a, b) for a, b in zip(*strides, strict=True)):
            continue
        taken = ahead + extent(y, inner)
        fits = [ahead >= extent(x, inner)]
        for i in reversed(steps):
            fits.append(taken <= x.stride(i))
            taken += (x.shape[i] - 1) * x.stride(i)
        if all(map(statically_known_true, fits)):
            return True
    return False


def extent(x: torch.Tensor, axes: tuple[int, ...]) -> Any:
    """The distance of the first element and the one behind the last, along some axes."""
    return sum((x.shape[i] - 1) * x.stride(i) for i in axes) + 1


def unlike_states(layout: str, states: list[Any]) -> Refusal | None:
    """Why one kernel can not take these convolution states for q, k and v."""
    rows, dim = (1, 2) if layout == "SD" else (2, 1)
    first = states[0]
    for state in states[1:]:
        sizes = [(x.shape[0], x.shape[rows], x.stride(dim)) for x in (first, state)]
        if state.dtype != first.dtype or not same_shape(*sizes):
            return Refusal(
                "the states of q, k and v differ in slots, rows, dtype or stride of channels"
            )
    return None


def renamed(convs: list[Call]) -> list[Call]:
    """The calls, writing what an operator that takes three states calls them."""
    names = ("q_state", "k_state", "v_state")
    return [
        replace(conv, renamed={"conv_state": name}) if "conv_state" in conv.args else conv
        for conv, name in zip(convs, names, strict=True)
    ]


def unpacked_args(convs: list[Call]) -> dict[str, Any]:
    """The arguments of the convolutions by the names of an operator that takes three of them."""
    args = dict(convs[0].args)
    for name, conv in zip("qkv", convs, strict=True):
        args[name] = conv.args["x"]
        args |= {f"{name}_{what}": conv.args[what] for what in ("weight", "bias")}
    return args


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
