"""Reading a graph: the calls in it, what leads from one to another, the values of nodes.

An operator that writes a state is an `auto_functionalized_v2` node, which takes the old state and
returns the new one. `Call` reads such a node and an ordinary call in the same way.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from kda_ops._checks import FLOATS
from kda_ops._library import NAMESPACE, REFERENCE_NAMESPACE
from kda_ops.lowering.graph.sizes import is_size

aten, prims = torch.ops.aten, torch.ops.prims
functionalized = torch.ops.higher_order.auto_functionalized_v2

NAMESPACES = (NAMESPACE, REFERENCE_NAMESPACE)
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.clone.default,
)


@dataclass(frozen=True)
class Refusal:
    """Why a match is not replaced.

    Attributes:
        reason: In a sentence.
        node: The node that it is about; None for the call at which the match was found.
    """

    reason: str
    node: fx.Node | None = None


@dataclass(frozen=True)
class Call:
    """A call of an operator, ordinary or functionalised.

    Attributes:
        node: The node.
        op: The operator.
        args: Its arguments by name; a written argument of a functionalised call is the base tensor
            that it is a view of.
        renamed: What the operator that replaces it (see `emit`) calls its written arguments, where
            that is another name.
    """

    node: fx.Node
    op: Any
    args: dict[str, Any]
    renamed: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(node: Any) -> "Call | None":
        """The call that a node makes of one of this package's operators, or None."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        if node.target is functionalized:
            op, args = node.args[0], dict(node.kwargs)
            if getattr(op, "namespace", None) not in NAMESPACES:
                return None
            for name in written(op):
                index = args[f"_{name}_base_index"]
                args[name] = None if index is None else args["_all_bases"][index]
            return Call(node, op, args)
        if getattr(node.target, "namespace", None) not in NAMESPACES:
            return None
        names = [argument.name for argument in node.target._schema.arguments]
        args = dict(zip(names, node.args, strict=False))
        return Call(node, node.target, {**args, **node.kwargs})

    @property
    def results(self) -> int:
        """How many values the operator returns, written arguments not counted."""
        return len(self.op._schema.returns)

    def result(self, index: int = 0) -> fx.Node | None:
        """The node of one result, None if it is not used."""
        if self.node.target is not functionalized and self.results == 1:
            return self.node
        return next((n for n in self.node.users if n.args[1] == index), None)

    def bases(self) -> list[fx.Node]:
        """The tensors that the written arguments are views of."""
        return self.args.get("_all_bases", [])

    def new_bases(self) -> list[tuple[int, fx.Node]]:
        """`(i, node)` for the node of each base's new value, where it is used."""
        found = [(i, self.result(self.results + i)) for i in range(len(self.bases()))]
        return [(i, new) for i, new in found if new is not None]

    def view(self, name: str) -> torch.Tensor:
        """The fake value of a written argument itself, the view of its base."""

        def part(key: str) -> Any:
            return values(self.args[f"_{name}_{key}"])

        base = value(self.args[name])
        with V.fake_mode:
            if f"_{name}_slice_dim" in self.args:
                edges = part("slice_start"), part("slice_end")
                return aten.slice.Tensor(base, part("slice_dim"), *edges)
            if f"_{name}_size" in self.args:
                return torch.as_strided(base, part("size"), part("stride"), part("storage_offset"))
        return base

    def inputs(self, *without: str) -> list[fx.Node]:
        """The nodes that the call reads, but for the arguments with these names."""
        found: list[fx.Node] = []
        fx.node.map_arg({k: x for k, x in self.args.items() if k not in without}, found.append)
        return found

    def nodes(self) -> list[fx.Node]:
        """The call and its getitem users."""
        if self.node.target is not functionalized and self.results == 1:
            return [self.node]
        return [self.node, *self.node.users]


def forward_of(backward: Call, op: Any) -> Call | None:
    """The call of `op` with the arguments of a call of its gradient, q among them."""
    names = [argument.name for argument in op._schema.arguments]
    for user in backward.args["q"].users:
        call = Call.of(user)
        if call is None or call.op is not op:
            continue
        pairs = [(call.args[name], backward.args[name]) for name in names]
        if all(x is y or (not isinstance(x, fx.Node) and x == y) for x, y in pairs):
            return call
    return None


def operator_of(node: fx.Node) -> Any:
    """The operator that a node calls, functionalised or not."""
    return node.args[0] if node.target is functionalized else node.target


def written(op: Any) -> list[str]:
    """Names of the arguments that an operator writes."""
    return [argument.name for argument in op._schema.arguments if argument.is_write]


def strip_views(node: Any) -> tuple[Any, list[fx.Node]]:
    """What a value is a view (or a copy) of, elements in the same order, and the nodes from there
    to `node`.
    """
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and is_view(node):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def strip_views_and_casts(node: Any) -> tuple[Any, list[fx.Node]]:
    """Like `strip_views`, before casts that lose nothing and factors of 1, too."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and (
        is_view(node) or is_lossless_cast(node) or times_one(node)
    ):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def is_view(node: fx.Node) -> bool:
    """Whether a node keeps all elements in their (row-major) order."""
    if node.target in VIEWS:
        return True
    if node.target in (aten.select.int, aten.expand.default):
        return statically_known_true(value(node.args[0]).numel() == value(node).numel())
    if node.target is aten.permute.default:
        sizes = value(node.args[0]).shape
        long = [axis for axis in node.args[1] if not statically_known_true(sizes[axis] == 1)]
        return long == sorted(long)
    return False


def is_lossless_cast(node: fx.Node) -> bool:
    """Whether a node is a cast that loses nothing, between dtypes that the operators take."""
    if not between_floats(node):
        return False
    return torch.promote_types(value(node.args[0]).dtype, value(node).dtype) == value(node).dtype


def between_floats(node: fx.Node) -> bool:
    """Whether a node is a cast between dtypes that the operators take."""
    if node.target is not prims.convert_element_type.default:
        return False
    return {value(node.args[0]).dtype, value(node).dtype} <= set(FLOATS)


def times_one(node: fx.Node) -> bool:
    """Whether a node multiplies by 1, as `1.0 / x` does behind the reciprocal."""
    if node.target is not aten.mul.Tensor or isinstance(node.args[1], fx.Node):
        return False
    return node.args[1] == 1 and value(node.args[0]).dtype == value(node).dtype


def strip_casts(node: fx.Node) -> fx.Node:
    """A value before the casts that lose nothing."""
    while is_lossless_cast(node):
        node = node.args[0]
    return node


def follow_views(node: fx.Node) -> list[fx.Node]:
    """A node and the views after it, as long as each is the only user of the one before."""
    path = [node]
    while (user := only_user(path[-1])) is not None and is_view(user):
        path.append(user)
    return path


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses the elements of another (its size may have other uses)."""
    users = [user for user in node.users if not is_size(user)]
    return users[0] if len(users) == 1 else None


def value(node: Any) -> Any:
    """The fake tensor or symbolic number of a node; anything else is its own value."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def values(tree: Any) -> Any:
    """`value` of every node in nested arguments."""
    return fx.node.map_arg(tree, value)


def same_shape(x: Iterable[Any], y: Iterable[Any]) -> bool:
    return statically_known_true(sym_eq(tuple(x), tuple(y)))


def same(x: Any, y: Any) -> bool:
    """Whether two arguments are one value, in one shape, with views stripped."""
    if x is y:
        return True
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
        return not isinstance(x, fx.Node) and not isinstance(y, fx.Node) and x == y
    a, b = value(x), value(y)
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return False
    if not isinstance(a, torch.Tensor):
        return statically_known_true(a == b)
    return structurally_equal(strip_views(x)[0], strip_views(y)[0]) and same_shape(a.shape, b.shape)


def structurally_equal(x: Any, y: Any, proven: set[Any] | None = None) -> bool:
    """Whether two arguments are one node, or come out of the same calls with the same arguments:
    what a model writes twice, such as `x.float()`, is twice in the graph.
    """
    proven = set() if proven is None else proven
    if x is y or (isinstance(x, fx.Node) and (x, y) in proven):
        return True
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        if x.op != "call_function" or x.target is not y.target or not repeatable(x.target):
            return False
        if not structurally_equal((*x.args, x.kwargs), (*y.args, y.kwargs), proven):
            return False
        proven.add((x, y))
        return True
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(
            structurally_equal(*pair, proven) for pair in zip(x, y, strict=True)
        )
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(structurally_equal(x[key], y[key], proven) for key in x)
    return type(x) is type(y) and not isinstance(x, fx.Node) and bool(x == y)


def repeatable(target: Any) -> bool:
    """Whether a call gives the same again."""
    if target is operator.getitem:
        return True
    if getattr(target, "namespace", None) not in ("aten", "prims"):
        return False
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    return not (seeded or target._schema.is_mutable)
