"""Rewrites of a training graph before autograd, where it still says what the model's author wrote.

Behind autograd a norm or a gate in plain PyTorch is spread over the forward and the backward, and
what lies between is saved: no pattern finds it. As an operator it has a gradient of its own, and
`chunk_kda_training` goes on from there.

Dynamo's graph is neither functional nor of one form, so patterns do not read it. It is traced to
ATen with its fake values, the rewrites run on the trace, and the operators that they put there are
copied to Dynamo's graph. All else of that graph stays as it is: autocast, checkpoints, modes.
"""

import functools
import itertools
import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from kda_ops._library import NAMESPACE, REFERENCE_NAMESPACE
from kda_ops.lowering.graph.matching import Refusal, same_shape, value
from kda_ops.lowering.graph.provenance import inherit
from kda_ops.lowering.graph.sizes import share_sizes
from kda_ops.lowering.rewrites.framework import BEFORE_AUTOGRAD, Attempt, report

logger = logging.getLogger("kda_ops.lowering")

STRIDED = ("as_strided", "as_strided_", "stride", torch.as_strided)


def rewrite_before_autograd(gm: fx.GraphModule) -> None:
    """Replaces plain PyTorch by operators in one of Dynamo's graphs, if it is trained."""
    given = gm.graph.find_nodes(op="placeholder")
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors_of(*given)):
        return
    called = {getattr(node.target, "namespace", None) for node in gm.graph.nodes}
    if NAMESPACE not in called or REFERENCE_NAMESPACE in called:
        return
    tensors = tensors_of(*gm.graph.nodes)
    if not all(type(x) in (FakeTensor, torch.nn.Parameter) for x in tensors):
        logger.debug("not rewritten before autograd: there are subclasses of tensors")
        return
    # that of Dynamo, which is no longer the current one
    mode = next((x.fake_mode for x in tensors if isinstance(x, FakeTensor)), None)
    if mode is None:
        return
    try:
        with mode:  # or tensors that the graph makes would be real, and numbers drawn
            traced = trace(gm)
    except Exception as error:  # a graph that stays as it is is right, only slower
        logger.debug("not rewritten before autograd: %s: %s", type(error).__name__, error)
        return
    with V.set_fake_mode(mode), torch.no_grad():
        share_sizes(traced.graph)
        attempts = [attempt for step in BEFORE_AUTOGRAD for attempt in step(traced.graph)]
    copy_back(gm.graph, traced, attempts)
    report(attempts)


def tensors_of(*nodes: fx.Node) -> list[torch.Tensor]:
    """The tensors that nodes of Dynamo's had there, one or several each."""
    found = tree_leaves([node.meta.get("example_value") for node in nodes])
    return [x for x in found if isinstance(x, torch.Tensor)]


class Retrace(fx.Interpreter):
    """Runs Dynamo's graph. What is opaque has the value that it had in Dynamo.

    Attributes:
        results: The tensor or the size of each node.
        writers: Nodes that have written an argument.
        written: The memory that they wrote.
    """

    def __init__(self, gm: fx.GraphModule, opaque: dict[fx.Node, Any]) -> None:
        super().__init__(gm)
        self.opaque = opaque
        self.results: dict[fx.Node, Any] = {}
        self.writers: set[fx.Node] = set()
        self.written: set[int | None] = set()
        self.entered: list[Any] = []

    def run_node(self, node: fx.Node) -> Any:
        read = [x for x in node.all_input_nodes if isinstance(self.results.get(x), torch.Tensor)]
        versions = [self.results[x]._version for x in read]
        if node not in self.opaque:
            result = super().run_node(node)
        else:
            result = self.opaque[node]
            if cuts_gradient(node):  # run for what it writes
                with disable_proxy_modes_tracing():
                    super().run_node(node)
            elif node.target is triton_kernel_wrapper_mutation:
                self.written |= {storage(x) for x in read}
        for x, version in zip(read, versions, strict=True):
            if self.results[x]._version != version:
                self.writers.add(node)
                self.written.add(storage(x))
        if node.target is _enter_autocast:
            self.entered.append(result)
        elif node.target is _exit_autocast:
            self.entered.remove(self.env[node.args[0]])
        if isinstance(result, (torch.Tensor, torch.SymInt)):
            self.results[node] = result
        return result

    def run(self, *args: Any) -> Any:
        try:
            with torch.no_grad():
                return super().run(*args)
        finally:
            while self.entered:
                _exit_autocast(self.entered.pop())


def storage(node: fx.Node) -> int | None:
    """The memory that a node of Dynamo's is a view of."""
    x = node.meta.get("example_value")
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else None


@dataclass
class Traced:
    """Dynamo's graph in ATen.

    Attributes:
        graph: The graph.
        nodes: For each node of Dynamo's with a tensor or a size the node with the same.
        barriers: Nodes of Dynamo's that stay where they are, and others on their side of them.
        written: The memory that is written.
    """

    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node]
    barriers: set[fx.Node]
    written: set[int | None]


def opaque_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that are not traced: inputs, subgraphs, what ends gradients or is no tensor's,
    sizes that are known at run time.
    """
    run = (_enter_autocast, _exit_autocast, operator.setitem)
    found = []
    for node in graph.nodes:
        if node.target in run or node.op == "output":
            continue
        if (
            node.op in ("placeholder", "get_attr", "call_module")
            or isinstance(node.target, HigherOrderOperator)
            or "example_value" not in node.meta
            or free_unbacked_symbols(node.meta["example_value"])
            or cuts_gradient(node)
        ):
            found.append(node)
    return found


def cuts_gradient(node: fx.Node) -> bool:
    """Whether a node reads what has a gradient and makes what has none, such as `x.detach()` and
    what runs under `torch.no_grad()`. The trace would not show it.
    """
    results = [x for x in tensors_of(node) if x.is_floating_point()]
    if not results or node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, HigherOrderOperator):
        return False
    read = tensors_of(*node.all_input_nodes)
    return any(x.requires_grad for x in read) and not any(x.requires_grad for x in results)


def trace(gm: fx.GraphModule) -> Traced:
    opaque = opaque_nodes(gm.graph)
    leaves, structure = tree_flatten([node.meta.get("example_value") for node in opaque])
    symbolic = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    places = [i for i, x in enumerate(leaves) if isinstance(x, symbolic)]
    runs: list[Retrace] = []

    def run(*values: Any) -> list[torch.Tensor]:
        known = dict(zip(places, values, strict=True))
        flat = [known.get(i, x) for i, x in enumerate(leaves)]
        run = Retrace(gm, dict(zip(opaque, tree_unflatten(flat, structure), strict=True)))
        run.run()
        runs.append(run)
        return list(run.results.values())

    table = select_decomp_table()
    with enable_python_dispatcher(), fx.traceback.preserve_node_meta():
        graph = make_fx(run, decomposition_table=table)(*[leaves[i] for i in places]).graph
    write_elsewhere(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # of any strides
    (output,), (run_,) = graph.find_nodes(op="output"), runs
    nodes = dict(zip(run_.results, output.args[0], strict=True))
    hidden = {*opaque, *gm.graph.find_nodes(op="output")}
    output.args = ([nodes[x] for x in nodes if x in hidden or not hidden.isdisjoint(x.users)],)
    given = ("placeholder", "get_attr")
    modes = [x for x in gm.graph.nodes if x.target in (_enter_autocast, _exit_autocast)]
    barriers = {*run_.writers, *modes, *(x for x in opaque if x.op not in given)}
    return Traced(graph, nodes, barriers, run_.written)


def write_elsewhere(graph: fx.Graph) -> None:
    """Makes new values of what decompositions write in place, as that of `F.rms_norm` does."""
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        plain = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overload = getattr(plain, getattr(node.target, "_overloadname", ""), None)
        if not name.endswith("_") or overload is None or len(node.args[0].users) > 1:
            continue
        if (
            isinstance(node.args[0].target, torch._ops.OpOverload)
            and not node.args[0].target.is_view
        ):
            node.target = overload


def copy_back(graph: fx.Graph, traced: Traced, attempts: list[Attempt]) -> None:
    """Copies what took the place of a traced node to Dynamo's graph, in the place of the node that
    was traced, or refuses the attempts that put it there.
    """
    makers = {old: (new, attempt) for attempt in attempts for old, new in attempt.replaced.items()}
    originals: dict[fx.Node, fx.Node] = {}
    for original, node in traced.nodes.items():
        originals.setdefault(node, original)
    for original, node in traced.nodes.items():
        new, made_by = node, []
        while new in makers:
            new, attempt = makers[new]
            made_by.append(attempt)
        if new is node or new._erased:
            continue
        copies = copied(new, originals)
        sources = [new, *(x for copy in copies for x in copy.all_input_nodes)]
        read = [originals[x] for x in sources if x in originals]
        after = max([original, *read])
        views = views_to_reshape(original, value(new))
        refusal = None
        if any(copy.op != "call_function" for copy in copies):
            refusal = "it reads what has no name before autograd"
        elif not traced.written.isdisjoint(map(storage, read)):
            refusal = "what it reads is written in place"
        elif storage(original) in traced.written:
            refusal = f"{original.name} is written in place"
        elif between(original, after) & traced.barriers:
            refusal = f"{original.name} reads what comes late"
        elif views is None:
            refusal = f"the strides of {original.name} matter"
        if refusal is not None or views is None:
            for attempt in made_by:
                attempt.refuse("replacement", Refusal(str(refusal), original))
            continue
        for view in views:
            view.target = str(view.target).replace("view", "reshape")
        with graph.inserting_before(original if after is original else after.next):
            for copy in copies:
                made = graph.node_copy(copy, originals.__getitem__)
                made.meta = {"example_value": copy.meta["val"]}
                inherit(made, original)
                originals[copy] = made
        original.replace_all_uses_with(originals[new])
    stable_topological_sort(graph)


def views_to_reshape(original: fx.Node, new: torch.Tensor) -> list[fx.Node] | None:
    """The calls of `view` that another tensor in the place of a node may be laid out wrong for,
    None if more than that may depend on how it is.
    """
    (old,) = tensors_of(original)
    if not same_shape(old.shape, new.shape) or old.dtype != new.dtype:
        return None
    if same_shape(old.stride(), new.stride()):
        return []
    # what is computed from either is then laid out alike
    if not (is_row_major(old) and is_row_major(new)):
        return None
    found, pending = [], [original]
    while pending:
        for user in pending.pop().users:
            if user.target in ("view", "view_as"):
                found.append(user)
            if reads_strides(user):
                return None
            if storage(original) in {x.untyped_storage()._cdata for x in tensors_of(user)}:
                pending.append(user)
    return found


def is_row_major(x: torch.Tensor) -> bool:
    steps = [
        step
        for step, size in zip(x.stride(), x.shape, strict=True)
        if not statically_known_true(size == 1)
    ]
    return all(statically_known_true(a >= b) for a, b in itertools.pairwise(steps))


def reads_strides(node: fx.Node) -> bool:
    """Whether the strides of what a node reads may matter, or stand in it as numbers."""
    if node.op not in ("call_function", "call_method") or node.target in STRIDED:
        return True
    if node.target == "view" and any(isinstance(x, torch.dtype) for x in node.args):
        return True
    if isinstance(node.target, HigherOrderOperator):
        return True
    return getattr(node.target, "namespace", NAMESPACE) not in (NAMESPACE, "aten")


def between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """The nodes from one to another."""
    found = {last}
    while first is not last:
        found.add(first)
        first = first.next
    return found


def copied(node: fx.Node, originals: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """A node and what leads to it from nodes that Dynamo's graph has, in order."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in originals and node not in found:
            found[node] = None
            pending += node.all_input_nodes
    return sorted(found)


def install_before_autograd() -> None:
    """Runs these rewrites before Inductor's own passes over Dynamo's graph, in no user's slot."""
    from torch._inductor import compile_fx, config

    passes = compile_fx.pre_grad_passes

    @functools.wraps(passes)
    def pre_grad_passes(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        if config.pattern_matcher:  # as for the rewrites behind
            rewrite_before_autograd(gm)
        return passes(gm, *args, **kwargs)

    compile_fx.pre_grad_passes = pre_grad_passes
