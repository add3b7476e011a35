"""New nodes of a graph: calls by name, functionalised where what they replace is, and shapes.

Inductor's own passes then write the states in place, as they do for the small operators.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kda_ops.lowering.graph.matching import Call, functionalized, same_shape, value, values, written

aten = torch.ops.aten


class UnknownSizeError(Exception):
    """A symbolic size that no node of the graph has."""


def compute(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    with V.fake_mode:
        node.meta["val"] = target(*values(args), **values(kwargs))
    return node


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
