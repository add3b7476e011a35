"""What every graph rewrite shares: walking the graph, replacing a part of it, and a log of it.

Rewrites run on Inductor's post-grad graph, after Inductor's own patterns. The graph is functional
there: an operator that writes a state is an `auto_functionalized_v2` node, which takes the old
state and returns the new one, so a write between two operators is an edge like any other.
`Call` reads such a node and an ordinary call in the same way, and `emit` makes either; Inductor's
own passes then write the state in place, as they do for the small operators.

A rewrite is three functions:

* pattern: the nodes that one call and its surroundings are made of, or None;
* guard: why they can not be replaced (a sentence), or None;
* replacement: new nodes in the place of the old outputs.

What holds for every rewrite is checked here: nothing that disappears is used elsewhere, and what
the new node reads does not depend on what it replaces.
"""

import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._inductor.fx_passes.post_grad import pass_patterns
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from lowering.provenance import inherit, layer_of, named, source_of
from lowering.sizes import is_size, share_sizes, sizes_for

aten, prims = torch.ops.aten, torch.ops.prims
functionalized = torch.ops.higher_order.auto_functionalized_v2
logger = logging.getLogger("kda_ops.lowering")

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
class Outcome:
    """What became of one place that looked like a rewrite.

    Attributes:
        rewrite: Name of the rewrite.
        node: The operator call at which it was found.
        layer: Path of the innermost module the call was traced in, empty if unknown.
        reason: Why it did not fire; None if it did.
        removed: Operators of the calls that it replaces.
        bytes_saved: Bytes that their intermediate results no longer move through memory (or would
            not, where it did not fire), written once and read once. Symbolic sizes count with
            their hint.
        nodes: Names of all nodes that it replaces.
        operator: The operator that is called there.
        source: The model's line of source of the call.
        check: What said no: `guard` of the rewrite, `escapes`, `depends_on_itself` or
            `replacement`; None if it fired.
        blamed: The node that the reason is about.
        blamed_source: That node's line of source.
    """

    rewrite: str
    node: str
    layer: str
    reason: str | None = None
    removed: tuple[str, ...] = ()
    bytes_saved: int = 0
    nodes: tuple[str, ...] = ()
    operator: str = ""
    source: str = ""
    check: str | None = None
    blamed: str = ""
    blamed_source: str = ""

    def __str__(self) -> str:
        where = f"{self.layer or 'graph'}: {self.node}"
        if self.reason is not None:
            return f"{self.rewrite} did not fire at {where}: {self.reason}"
        return f"{self.rewrite} fired at {where}, replaces {', '.join(self.removed)}"


class UnknownSizeError(Exception):
    """A symbolic size that no node of the graph has."""


@dataclass
class Found:
    """A part of a graph that a pattern recognised.

    Attributes:
        inner: Nodes that disappear.
        outputs: Those of them whose values live on, computed by the replacement.
        inputs: Nodes that the replacement reads.
        values: What the guard and the replacement need to know.
    """

    inner: list[fx.Node]
    outputs: list[fx.Node]
    inputs: list[fx.Node]
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inner = list(dict.fromkeys(self.inner))


@dataclass(frozen=True)
class Rewrite:
    """One rewrite; `anchors` are the operators at which its pattern is tried."""

    name: str
    anchors: tuple[Any, ...]
    pattern: Callable[[fx.Node], Found | None]
    guard: Callable[[Found], str | None]
    replacement: Callable[[fx.Graph, Found], dict[fx.Node, fx.Node]]

    def __call__(self, graph: fx.Graph) -> None:
        for node in [node for node in graph.nodes if operator_of(node) in self.anchors]:
            if node._erased:
                continue
            found = self.pattern(node)
            if found is None:
                continue
            found.inner = list(dict.fromkeys([*found.inner, *sizes_for(found.inner)]))
            outcome = outcome_of(self.name, node, found)
            check, reason = self._refusal(found)
            if reason is None:
                check, reason = "replacement", self._replace(graph, node, found)
            report(outcome if reason is None else refused(outcome, found, node, check, reason))

    def _refusal(self, found: Found) -> tuple[str, str | None]:
        """What says no, and why; the reason is None if nothing does."""
        checks = {"guard": self.guard, "escapes": escapes, "depends_on_itself": depends_on_itself}
        for name, check in checks.items():
            if (reason := check(found)) is not None:
                return name, reason
        return "", None

    def _replace(self, graph: fx.Graph, anchor: fx.Node, found: Found) -> str | None:
        last = max(found.inner)
        before = last.prev
        try:
            with graph.inserting_before(last):
                news = self.replacement(graph, found)
        except UnknownSizeError as error:
            while last.prev is not before:
                graph.erase_node(last.prev)
            return str(error)
        made = last.prev
        while made is not before:
            describe(made, anchor)
            made.meta["rewrite"] = self.name
            made = made.prev
        for old, new in news.items():
            old.replace_all_uses_with(new)
        out_of_order = any(user < new for new in news.values() for user in new.users)
        unused = [node for inner in found.inner for node in inner.all_input_nodes]
        for node in sorted(found.inner, reverse=True):
            graph.erase_node(node)
        while unused:  # casts and views of what was read, which would count as users of it
            node = unused.pop()
            if not node._erased and not node.users and (moves(node) or widens(node)):
                unused += node.all_input_nodes
                graph.erase_node(node)
        if out_of_order:
            stable_topological_sort(graph)
        return None


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
            if getattr(op, "namespace", None) != "kda_ops":
                return None
            for name in written(op):
                index = args[f"_{name}_base_index"]
                args[name] = None if index is None else args["_all_bases"][index]
            return Call(node, op, args)
        if getattr(node.target, "namespace", None) != "kda_ops":
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

    def inputs(self) -> list[fx.Node]:
        """The nodes that the call reads."""
        return self.node.all_input_nodes

    def nodes(self) -> list[fx.Node]:
        """The call and the nodes that take its results apart."""
        if self.node.target is not functionalized and self.results == 1:
            return [self.node]
        return [self.node, *self.node.users]


def operator_of(node: fx.Node) -> Any:
    """The operator that a node calls, functionalised or not."""
    return node.args[0] if node.target is functionalized else node.target


def written(op: Any) -> list[str]:
    """Names of the arguments that an operator writes."""
    return [argument.name for argument in op._schema.arguments if argument.is_write]


def origin(node: Any) -> tuple[Any, list[fx.Node]]:
    """Where a value comes from before anything that keeps its elements and their order, and the
    nodes from there to `node`.
    """
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and moves(node):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def wide_origin(node: Any) -> tuple[Any, list[fx.Node]]:
    """Like `origin`, before casts that lose nothing, too."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and (moves(node) or widens(node)):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def moves(node: fx.Node) -> bool:
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


def widens(node: fx.Node) -> bool:
    """Whether a node is a cast that loses nothing."""
    if node.target is not prims.convert_element_type.default:
        return False
    source, dtype = value(node.args[0]).dtype, value(node).dtype
    return dtype.is_floating_point and torch.promote_types(source, dtype) == dtype


def moved(node: fx.Node) -> list[fx.Node]:
    """A node and the moves after it, as long as each is the only user of the one before."""
    path = [node]
    while (user := only_user(path[-1])) is not None and moves(user):
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
    """Whether two arguments are one value: one node, or moves of one that end in the same shape."""
    if x is y:
        return True
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
        return not isinstance(x, fx.Node) and not isinstance(y, fx.Node) and x == y
    a, b = value(x), value(y)
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return False
    if not isinstance(a, torch.Tensor):
        return statically_known_true(a == b)
    return origin(x)[0] is origin(y)[0] and same_shape(a.shape, b.shape)


def compute(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    with V.fake_mode:
        node.meta["val"] = target(*values(args), **values(kwargs))
    return node


def describe(node: fx.Node, anchor: fx.Node) -> None:
    """Gives a new node its place in the model, and its operator a place in kernel names."""
    inherit(node, anchor)
    if isinstance(node.target, torch._ops.OpOverload):
        node.meta.setdefault("original_aten", node.target)


def replay(graph: fx.Graph, path: list[fx.Node], old: fx.Node, new: fx.Node) -> fx.Node:
    """What the nodes of `path`, each the argument of the next, make of `new` instead of `old`."""
    copies = {old: new}
    for node in path:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
        copies[node] = new = compute(graph, node.target, *args, **kwargs)
    return new


def reshape(graph: fx.Graph, x: fx.Node, shape: Iterable[Any]) -> fx.Node:
    """`x` in another shape.

    Raises:
        UnknownSizeError: Several sizes are symbolic, and one is neither a size of `x` nor a number
            in the graph.
    """
    shape = list(shape)
    if same_shape(value(x).shape, shape):
        return x
    symbolic = [i for i, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(symbolic) == 1:
        shape[symbolic[0]] = -1
    else:
        for i in symbolic:
            shape[i] = size_node(graph, x, shape[i])
    return compute(graph, aten.reshape.default, x, shape)


def size_node(graph: fx.Graph, x: fx.Node, size: torch.SymInt) -> fx.Node:
    """A node whose value is `size`: a size of `x` or an input of the graph."""
    for axis, candidate in enumerate(value(x).shape):
        if statically_known_true(candidate == size):
            return compute(graph, aten.sym_size.int, x, axis)
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(value(node), torch.SymInt) and statically_known_true(value(node) == size):
            return node
    raise UnknownSizeError(f"no node of the graph has the size {size}")


def emit(
    graph: fx.Graph, op: Any, args: dict[str, Any], *calls: Call
) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """A call of `op` with arguments by name.

    Args:
        graph: Where; at its insertion point.
        op: The operator.
        args: Its arguments by name. The written ones come from `calls`.
        calls: The calls it replaces. What they write, under the same names or those in their
            `renamed`, `op` writes.

    Returns:
        The nodes of its results, and for each node of a written base's new value the node that
        takes its place.
    """
    names = [argument.name for argument in op._schema.arguments]
    writers = [call for call in calls if call.node.target is functionalized]
    if not writers:
        return results(graph, compute(graph, op, *[args[name] for name in names])), {}
    bases: list[fx.Node] = []
    views: dict[str, Any] = {}
    places: dict[fx.Node, int] = {}  # of the new values in `bases`
    for call in writers:
        indices = []
        for base in call.args["_all_bases"]:
            if base not in places and base not in bases:
                bases.append(base)
            # the second operator may write what the first one has written
            indices.append(places[base] if base in places else bases.index(base))
        for i, new in call.new_bases():
            places[new] = indices[i]
        for name in written(call.op):
            old, new = f"_{name}_", f"_{call.renamed.get(name, name)}_"
            view = {k.removeprefix(old): x for k, x in call.args.items() if k.startswith(old)}
            view["base_index"] = indices[view["base_index"]]
            views |= {new + key: x for key, x in view.items()}
    given = {name: args[name] for name in names if name not in written(op)}
    node = graph.call_function(functionalized, (op,), {**given, **views, "_all_bases": bases})
    with V.fake_mode:
        node.meta["val"] = functionalized(op, **values(dict(node.kwargs)))
    found = results(graph, node)
    count = len(op._schema.returns)
    return found[:count], {new: found[count + i] for new, i in places.items()}


def results(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The nodes of what a node returns."""
    if isinstance(value(node), torch.Tensor):
        return [node]
    return [compute(graph, operator.getitem, node, i) for i in range(len(value(node)))]


def escapes(found: Found) -> str | None:
    """Why what disappears is still needed."""
    inner = set(found.inner)
    for node in found.inner:
        if node in found.outputs:
            continue
        for user in node.users:
            if user not in inner:
                what = "is returned" if user.op == "output" else f"is also used by {user.name}"
                return f"{node.name} {what}"
    return None


def depends_on_itself(found: Found) -> str | None:
    """Why the replacement could not come before everything that uses it."""
    inner, first = set(found.inner), min(found.inner)
    pending, seen = list(found.inputs), set()
    while pending:
        node = pending.pop()
        if node in inner:
            return f"an input depends on {node.name}"
        if node in seen or node < first:
            continue
        seen.add(node)
        pending += node.all_input_nodes
    return None


def outcome_of(name: str, node: fx.Node, found: Found) -> Outcome:
    """The outcome of a rewrite that fires."""
    removed = [call for call in map(Call.of, found.inner) if call]
    kept = [call.result(i) for call in removed for i in range(call.results)]
    moved = sum(_bytes(node) for node in kept if node is not None and node not in found.outputs)
    return Outcome(
        name,
        node.name,
        layer_of(node),
        removed=tuple(str(call.op) for call in removed),
        bytes_saved=2 * moved,
        nodes=tuple(inner.name for inner in found.inner),
        operator=str(operator_of(node)),
        source=source_of(node),
    )


def refused(outcome: Outcome, found: Found, node: fx.Node, check: str, reason: str) -> Outcome:
    """The outcome where a check said no."""
    blamed = named(reason, found.inner) or node
    return replace(
        outcome, reason=reason, check=check, blamed=blamed.name, blamed_source=source_of(blamed)
    )


def report(outcome: Outcome) -> None:
    """Logs an outcome and gives it to whoever is recording."""
    logger.log(logging.INFO if outcome.reason is None else logging.DEBUG, "%s", outcome)
    for listener in _listeners:
        listener.append(outcome)


def _bytes(node: fx.Node) -> int:
    x = value(node)
    if not isinstance(x, torch.Tensor):
        return 0
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in x.shape]
    return x.dtype.itemsize * math.prod(sizes) if None not in sizes else 0


_steps: list[Callable[[fx.Graph], None]] = []
_listeners: list[list[Outcome]] = []


@contextmanager
def recording() -> Iterator[list[Outcome]]:
    """Collects the outcomes of all rewrites tried meanwhile.

    A graph that comes from a cache is not rewritten: force the compilation to see anything.
    """
    outcomes: list[Outcome] = []
    _listeners.append(outcomes)
    try:
        yield outcomes
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not outcomes]


def register(
    name: str,
    anchors: tuple[Any, ...],
    pattern: Callable[[fx.Node], Found | None],
    guard: Callable[[Found], str | None],
    replacement: Callable[[fx.Graph, Found], dict[fx.Node, fx.Node]],
) -> None:
    """Adds a rewrite behind those that are registered."""
    _steps.append(Rewrite(name, anchors, pattern, guard, replacement))


class Rewrites:
    """All rewrites in sequence, in the shape of one of Inductor's own pattern passes."""

    def apply(self, gm: fx.GraphModule | fx.Graph) -> int:
        graph = gm if isinstance(gm, fx.Graph) else gm.graph
        if any(map(Call.of, graph.nodes)):
            share_sizes(graph)
            for step in _steps:
                step(graph)
        return 0


def install_rewrites() -> None:
    """Runs the rewrites after Inductor's patterns, in no slot that belongs to the user."""
    if not any(isinstance(patterns, Rewrites) for patterns in pass_patterns):
        pass_patterns.append(Rewrites())
