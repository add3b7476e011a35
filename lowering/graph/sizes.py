"""Symbolic sizes in a graph: nodes of their own, which read the tensors that they are sizes of.

A pattern looks for a node with one user. Under dynamic shapes `x.flatten(1, 2)` is also a
`sym_size` of `x` and a product, so before the rewrites no size is computed twice, and what computes
sizes only for nodes that disappear disappears with them.
"""

from typing import Any

import torch
from torch import fx

SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def share_sizes(graph: fx.Graph) -> None:
    """Replaces a size by a constant or by the first node that has its value."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            known: Any = first.setdefault(size.node.expr, node)
        elif type(size) is int:
            known = size
        else:
            continue
        if node.target in SIZES and known is not node:
            node.replace_all_uses_with(known) if isinstance(known, fx.Node) else inline(node, known)
            graph.erase_node(node)


def inline(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda n: number if n is node else n
        )


def sizes_for(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes that compute sizes of `nodes`, for nothing but `nodes`."""
    inner, found = set(nodes), []
    for node in nodes:
        pending = [user for user in node.users if is_size(user)]
        for size in pending:
            pending += [user for user in size.users if is_size(user) and user not in pending]
        if all(user in inner or user in pending for size in pending for user in size.users):
            found += pending
    return found


def is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), (torch.SymInt, int))
