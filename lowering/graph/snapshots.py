"""Copies of a state that a program takes before a step and reads after it.

    before = state.clone();  step_(state);  state.copy_(before)

The graph is functional: the step takes the old state and returns a new one, so nothing overwrites
`state` and its copy looks like `state` itself. Inductor removes it, then lets the step write in
place, and what reads the copy after that sees the new state; see docs/inductor-rollback.md. Here

* copies of what may be written in place are kept (`keep_copies`), in graphs that call an operator
  of this package;
* what they cost is kept down (`place_copies`): reads of a state go before the next write of it, so
  that the write is in place, and a state that is put back as it was is not written at all;
* a copy is made before the write, whatever operator writes (`order_reads`);
* a kernel that writes what is read at other positions waits for all reads (`keep_reads_apart`).
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.dependencies import MemoryDep
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.post_grad import noop_registry
from torch._inductor.fx_passes.reinplace import (
    _SCATTER_OP_TO_VIEW,
    inplaceable_foreach_ops,
    inplaceable_ops,
)
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V
from torch._library.utils import zip_schema
from torch.fx.passes.reinplace import _is_view_op
from torch.utils._pytree import tree_leaves

from kda_ops.lowering.graph.emitting import compute
from kda_ops.lowering.graph.matching import Call, functionalized, repeatable, same_shape, value
from kda_ops.lowering.graph.sizes import is_size

aten = torch.ops.aten
WRITERS = (
    functionalized,
    torch.ops.higher_order.auto_functionalized,
    torch.ops.higher_order.triton_kernel_wrapper_functional,
)
SCATTERS = (aten.index_put.default, aten._unsafe_index_put.default, *_SCATTER_OP_TO_VIEW)
INPLACEABLE = {*inplaceable_ops, *inplaceable_foreach_ops, *SCATTERS}


def keep_copies() -> None:
    """Makes Inductor's `remove_noop_ops` keep the copies of what may be written in place."""
    remove = post_grad.remove_noop_ops

    @functools.wraps(remove)
    def remove_noop_ops(graph: fx.Graph) -> None:
        hidden = [(node, node.target) for node in copies(graph)] if calls_ours(graph) else []
        for node, _ in hidden:
            node.target = _hidden
        try:
            remove(graph)
        finally:
            for node, target in hidden:
                node.target = target

    post_grad.remove_noop_ops = remove_noop_ops


def order_reads() -> None:
    """Realises reads of what an operator writes before the call of the operator.

    Inductor does so only after it has put the call in line (`FallbackKernel`), and then they may be
    scheduled behind it and see the new values.
    """
    create = ir.FallbackKernel.create.__func__

    def create_after_reads(cls: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kernel, torch._ops.OpOverload) and kernel._schema.is_mutable:
            for declared, x in zip_schema(kernel._schema, args, kwargs):
                for buffer in tree_leaves(x) if declared.is_write else []:
                    if isinstance(buffer, ir.IRNode):
                        buffer.realize()
                        V.graph.mark_buffer_mutated(buffer.get_name())
        return create(cls, kernel, *args, **kwargs)

    ir.FallbackKernel.create = classmethod(create_after_reads)


def keep_reads_apart() -> None:
    """Fuses a write with reads of what it writes only where the reads are at the same positions.

    Inductor looks for reads under the name that a buffer had before the first write, and finds none
    after that: `step_(state);  state.copy_(state.flip(0))` becomes one kernel.
    """
    fusable = Scheduler.fusable_weak_dep

    @functools.wraps(fusable)
    def fusable_weak_dep(self: Scheduler, weak_dep: Any, node1: Any, node2: Any) -> bool:
        if not fusable(self, weak_dep, node1, node2):
            return False
        real = self.mutation_real_name
        writes = [x for x in node2.read_writes.writes if x.name == weak_dep.mutating_buf]
        reads = [
            x
            for x in node1.read_writes.reads
            if real.get(x.name, x.name) == real[weak_dep.mutating_buf]
        ]
        return all(
            isinstance(x, MemoryDep) and (x.index, x.size) == (writes[0].index, writes[0].size)
            for x in reads
        )

    Scheduler.fusable_weak_dep = fusable_weak_dep


def _hidden(*args: Any) -> Any:
    """Stands for an operator that `remove_noop_ops` is not to see."""
    raise AssertionError("a hidden node was called")


def calls_ours(graph: fx.Graph) -> bool:
    """Whether a graph, or one inside it, calls an operator of this package."""
    owner = graph.owning_module
    inside = [] if owner is None else [m for m in owner.modules() if isinstance(m, fx.GraphModule)]
    return any(Call.of(node) for g in [graph, *(m.graph for m in inside)] for node in g.nodes)


def copies(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that may copy what may be written in place, and those that may be written or are
    returned themselves.
    """
    storages = written(graph)
    (returned,) = graph.find_nodes(op="output")
    kept = storages | {get_node_storage(node) for node in returned.all_input_nodes}
    found = []
    for node in graph.nodes:
        source = copied(node)
        if source is None or get_node_storage(node) == get_node_storage(source):
            continue  # the second is a view
        if get_node_storage(node) in kept or get_node_storage(source) in storages:
            found.append(node)
    return found


def copied(node: fx.Node) -> fx.Node | None:
    """What Inductor would put in the place of a node that may be a no-op."""
    if node.op != "call_function" or node.target not in noop_registry:
        return None
    _, index = noop_registry[node.target]
    source = node.args[index] if isinstance(index, int) else index(node.args)
    return source if isinstance(source, fx.Node) else None


def written(graph: fx.Graph) -> set[int | None]:
    """The storages that a graph may write in place: inputs that get a new value, and what an
    operator writes before and after.
    """
    nodes: list[fx.Node] = [
        node.args[0] for node in graph.find_nodes(op="call_function", target=aten.copy_.default)
    ]
    storages = {get_node_storage(node) for node in nodes}
    for node in graph.nodes:
        if node.target in WRITERS:
            nodes = [*node.kwargs.get("_all_bases", node.all_input_nodes), *node.users]
        elif node.target in INPLACEABLE:
            if not any(get_node_storage(x) in storages for x in node.all_input_nodes):
                continue
            nodes = [node, *node.users] if node.target in inplaceable_foreach_ops else [node]
        else:
            continue
        storages |= {get_node_storage(x) for x in nodes}
    return storages - {None}


def place_copies(graph: fx.Graph) -> None:
    """Leaves as it is what is put back as it was, puts reads of a state before its writes, and adds
    the copies without which Inductor would write over what is still read.
    """
    for restore in graph.find_nodes(op="call_function", target=aten.copy_.default):
        state, copy = restore.args[:2]
        if not restore.users and restores(state, copy):
            graph.erase_node(restore)
            if not copy.users:
                graph.erase_node(copy)
    for node, index in [*discarded_scatters(graph), *views_written(graph)]:
        with graph.inserting_before(node):
            node.update_arg(index, compute(graph, aten.clone.default, node.args[index]))
    views: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        views.setdefault(get_node_storage(node), []).append(node)
    for writer in graph.find_nodes(op="call_function", target=functionalized):
        storages = {get_node_storage(base) for base in writer.kwargs["_all_bases"]} - {None}
        for storage in storages:
            for user in [user for view in views[storage] for user in view.users]:
                if user > writer and user not in views[storage]:
                    read_before(writer, user)


def discarded_scatters(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """The scatters into what may be written in place whose results no state becomes, and 0.

    Inductor lets `torch.index_put(state, ...)` write the state itself if that is overwritten later,
    even if the result is read after that (pytorch issue 198094).
    """
    pending = [x.args[1] for x in graph.find_nodes(op="call_function", target=aten.copy_.default)]
    kept: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in kept:
            continue
        kept.add(node)
        if node.target is operator.getitem:
            pending += node.args[0].kwargs.get("_all_bases", [])
        elif node.target in SCATTERS:
            pending += node.args[:2]
        elif _is_view_op(node.target):
            pending.append(node.args[0])
    storages = written(graph)
    for node in graph.nodes:
        discarded = node.target in SCATTERS and node not in kept
        if discarded and get_node_storage(node.args[0]) in storages:
            yield node, 0


def views_written(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """What writes a view of a computed value, such as `state[1:].copy_(state.roll(1, 0)[1:])`, and
    1: Inductor computes it while it writes, from what it has written.
    """
    for node in graph.nodes:
        if node.target not in (aten.copy_.default, *_SCATTER_OP_TO_VIEW):
            continue
        source = node.args[1]
        while _is_view_op(source.target):
            source = source.args[0]
        computed = source.op == "call_function" and source.target not in (
            operator.getitem,
            *SCATTERS,
        )
        if computed and source is not node.args[1]:
            yield node, 1


def restores(state: fx.Node, copy: fx.Node) -> bool:
    """Whether a node is a copy of the old value of a state, and nothing else."""
    if copy.target not in (aten.clone.default, aten.copy.default) or copied(copy) is not state:
        return False
    old, new = value(state), value(copy)
    return old.dtype == new.dtype and same_shape(old.shape, new.shape)


def read_before(writer: fx.Node, reader: fx.Node) -> None:
    """Moves a reader before a writer, with what it needs, where that is possible.

    Inductor moves what is used late to where it is used (`reorder_for_locality`), and then lets the
    writer write a copy of the whole cache.
    """
    needed, pending = {reader}, [reader]
    while pending:
        node = pending.pop()
        if node is writer or not movable(node):
            return
        later = [n for n in node.all_input_nodes if not n < writer and n not in needed]
        needed.update(later)
        pending += later
    for node in sorted(needed):
        writer.prepend(node)


def movable(node: fx.Node) -> bool:
    """Whether a node computes the same wherever it is in the functional graph."""
    if node.op != "call_function" or node.target in (functionalized, aten.copy_.default):
        return False
    return is_size(node) or repeatable(node.target) or Call.of(node) is not None
