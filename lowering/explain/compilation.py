"""Explaining fusions: a model compiled without and with the rewrites, side by side.

Dynamo traces the model once. Its graph is compiled twice, up to the generated source, which is read
and not run; with gradients, up to that of the forward, as some rewrites come before the backward is
parted from it. For a model without a tensor on a GPU the graphs that Inductor gets are moved to a
CUDA device that is described (`kda_ops.lowering.explain.virtual_gpu`). Nothing of the model is
computed and no state is written.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import ExternKernel, FixedLayout, FlexibleLayout
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves

from kda_ops import lowering
from kda_ops.explain.result import Explanation, Fired, GraphNode, Layer, NearMiss, Side
from kda_ops.lowering.compat import size_hint
from kda_ops.lowering.explain.generated_code import launches
from kda_ops.lowering.explain.virtual_gpu import H200, described_device, described_driver, on_cuda
from kda_ops.lowering.graph.matching import Call, operator_of
from kda_ops.lowering.graph.provenance import layer_of, modules_of, source_of
from kda_ops.lowering.rewrites import before_autograd
from kda_ops.lowering.rewrites.framework import JointRewrites, Outcome, Rewrites, recording

RECURRENCES = (
    "chunk_kda", "chunk_kda_gated", "chunk_kda_gated_affine", "recurrent_kda", "kda_decode",
)  # fmt: skip
# what stands for `scaled_dot_product_attention` in a graph that was traced on a CPU
FOR_CPU = ("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention")
Paths = tuple[str, ...]  # the innermost module of every node behind something


@dataclass
class Compiled:
    """What one compilation leaves behind.

    Attributes:
        graph: The nodes, after the rewrites if they ran. As everything here, with the paths of the
            modules that it comes from.
        launches: Kernels in order.
        calls: What else is called, in order.
        buffers: Bytes of each intermediate result in memory.
        operators: Names of this package's operators in the graph.
        kinds: Class of each module.
        outcomes: Of the rewrites.
        failure: Why no code could be generated, empty if it was.
    """

    graph: list[tuple[Paths, GraphNode]] = field(default_factory=list)
    launches: list[tuple[Paths, str]] = field(default_factory=list)
    calls: list[tuple[Paths, str]] = field(default_factory=list)
    buffers: list[tuple[Paths, int]] = field(default_factory=list)
    operators: list[tuple[Paths, str]] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    failure: str = ""

    def look_at(self, graph: fx.Graph) -> None:
        """Keeps what is seen of a graph."""
        for node in graph.nodes:
            self.graph.append(((layer_of(node),), drawn(node)))
            self.kinds |= dict(modules_of(node))
            if (call := Call.of(node)) is not None:
                self.operators.append(((layer_of(node),), short(call.op)))


class Seen(BaseException):
    """Leaves a compilation when what is wanted of it is known, before there is anything to run.

    No `Exception`, so that nothing on the way takes it for a failure.
    """


def explain(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool
) -> Explanation:
    """Compiles `model(*args, **kwargs)` as one graph, without and with the rewrites."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    lowering.install()
    real = on_gpu(model, args, kwargs)
    before, after = Compiled(), Compiled()

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        for result, rewriting in ((before, False), (after, True)):
            with contextlib.suppress(Seen), watching(result, rewriting), recording() as outcomes:
                result.outcomes = outcomes
                compile_fx(copied(gm), inputs, inner_compile=inner_compile_of(result, real))
        raise Seen

    with contextlib.ExitStack() as stack:
        uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}
        stack.enter_context(inductor_config.patch(**uncached))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        if not real:
            stack.enter_context(described_driver())
        stack.enter_context(contextlib.suppress(Seen))
        compiled = torch.compile(eager(model), backend=backend, dynamic=dynamic, fullgraph=True)
        compiled(*args, **kwargs)
        raise ValueError("model must compute something that can be compiled, its graph is empty")
    root = type(model).__name__ if isinstance(model, torch.nn.Module) else "graph"
    device = torch.cuda.get_device_name() if real else H200.name
    shapes = "dynamic" if dynamic else "static"
    failures = (before.failure, after.failure)
    return Explanation(device, shapes, layers_of(before, after, root), failures)


def inner_compile_of(result: Compiled, real: bool) -> Callable[..., Any]:
    """What Inductor does with an ATen graph, of which the code that it would run goes to `result`.
    Where gradients are taken that is the forward graph, the first of two.
    """

    def inner_compile(gm: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        device = contextlib.nullcontext() if real else described_device()
        try:
            copy, moved = (copied(gm), list(inputs)) if real else on_cuda(gm, inputs)
            with device:
                compile_fx_inner(copy, moved, **how)
        except Exception as error:
            result.failure = said(error)
            if not result.graph:  # it failed before the rewrites
                result.look_at(gm.graph)
        raise Seen

    return inner_compile


def said(error: Exception) -> str:
    """An error of the compiler: its kind, its first line, and the operator that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[:1] + [line for line in lines[1:] if line.startswith("target:")][:1]
    return ": ".join([type(error).__name__, ", ".join(told)] if told else [type(error).__name__])


def eager(model: Any) -> Any:
    """What `torch.compile` was called with, if it was."""
    compiled = getattr(model, "_orig_mod", None)
    return compiled or getattr(model, "_torchdynamo_orig_callable", model)


def on_gpu(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether any tensor of a call is on a CUDA device."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if isinstance(model, torch.nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    return any(x.device.type == "cuda" for x in tensors)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for a compilation, which changes it."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    result = fx.GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    return result


@contextlib.contextmanager
def watching(result: Compiled, rewriting: bool) -> Iterator[None]:
    """Compilations leave what they make in `result`, and the rewrites run or not."""
    apply, apply_joint = Rewrites.apply, JointRewrites.apply
    rewrite = before_autograd.rewrite_before_autograd

    def watched(self: Rewrites, gm: fx.GraphModule | fx.Graph) -> int:
        if rewriting:
            apply(self, gm)
        result.look_at(gm if isinstance(gm, fx.Graph) else gm.graph)
        return 0

    def joint(self: JointRewrites, gm: fx.GraphModule | fx.Graph) -> int:
        return apply_joint(self, gm) if rewriting else 0

    def early(gm: fx.GraphModule) -> None:
        if rewriting:
            rewrite(gm)

    def enter(self: Scheduler, kernel: BaseSchedulerNode) -> None:
        parts = [part.node for part in kernel.get_nodes() if part.node is not None]
        V.graph.wrapper_code.enter_context(paths_of(parts, kernel.is_extern()))

    def read(self: GraphLowering) -> None:
        source, _ = self.codegen()
        result.buffers += intermediates(self)
        for launch in launches(source.value):
            # what `enter` was given holds for the lines that follow
            above = [paths for line, paths in source.line_map if line <= launch.line]
            paths = above[-1] if above else ()
            named = (paths, launch.name.replace(*FOR_CPU))
            (result.launches if launch.is_kernel else result.calls).append(named)
        raise Seen

    with (
        mock.patch.object(Rewrites, "apply", watched),
        mock.patch.object(JointRewrites, "apply", joint),
        mock.patch.object(before_autograd, "rewrite_before_autograd", early),
        mock.patch.object(Scheduler, "enter_context", enter),
        mock.patch.object(GraphLowering, "compile_to_module", read),
    ):
        yield


def paths_of(made: list[Any], called: bool) -> Paths:
    """Of the nodes of the graph behind parts of Inductor's IR, in order.

    What is called and not generated is the work of the last of them, the others make its arguments.
    """
    origins = {node for part in made for node in part.get_origins()}
    graph = V.graph.graph  # not the one that a lowering traced and inlined
    nodes = sorted(n for n in origins if n.graph is graph and n.op != "placeholder")
    return tuple(map(layer_of, nodes[-1:] if called else nodes))


def intermediates(graph: GraphLowering) -> Iterator[tuple[Paths, int]]:
    """Bytes of every buffer that one kernel leaves in memory for another."""
    others = {*graph.removed_buffers, *graph.get_output_names()}
    for buffer in graph.buffers:
        if buffer.get_name() in others or type(buffer.layout) not in (FixedLayout, FlexibleLayout):
            continue
        count = buffer.get_dtype().itemsize
        for length in buffer.get_size():
            count *= size_hint(length)
        called = isinstance(buffer, ExternKernel) or buffer.is_no_op()  # or what it is to fill
        yield paths_of([buffer], called), count


def drawn(node: fx.Node) -> GraphNode:
    """What of a node is shown."""
    x = node.meta.get("val")
    text = ""
    if isinstance(x, torch.Tensor):
        text = f"{str(x.dtype).removeprefix('torch.')}[{', '.join(map(str, x.shape))}]"
    operator = short(operator_of(node)) if node.op == "call_function" else node.op
    reads = tuple(read.name for read in node.all_input_nodes)
    return GraphNode(node.name, operator, reads, text, source_of(node), node.meta.get("rewrite"))


def short(operator: Any) -> str:
    """Name of an operator: without its namespace if it is ours, and without `default`."""
    if not isinstance(operator, (str, torch._ops.OpOverload)):
        operator = getattr(operator, "__name__", operator)
    return str(operator).removeprefix("kda_ops.").removesuffix(".default").replace(*FOR_CPU)


def layers_of(before: Compiled, after: Compiled, root: str) -> tuple[Layer, ...]:
    """Both compilations, divided among the layers of a model of class `root`."""
    kinds = {"": root, **before.kinds}
    homes = homes_of(before.operators)
    removed = removed_by_rewrites(before, after)
    before.graph = [(p, replace(n, rewrite=removed.get(n.name))) for p, n in before.graph]
    found = []
    for home in (*homes, None):

        def here(pairs: Any, home: str | None = home) -> Iterator[Any]:
            return (x for paths, x in pairs if home_of(paths, homes) == home)

        outcomes = list(here(((outcome.layer,), outcome) for outcome in after.outcomes))
        sides = [
            Side(
                tuple(here(compiled.launches)),
                tuple(here(compiled.calls)),
                2 * sum(here(compiled.buffers)),
                part_of([n for _, n in compiled.graph], {n.name for n in here(compiled.graph)}),
                bool(compiled.failure),
            )
            for compiled in (before, after)
        ]
        kind = "" if home is None else kinds[home]
        layer = Layer(home or "", kind, fired(outcomes), near_misses(outcomes), *sides)
        empty = not any(s.launches or s.calls or (s.failed and s.graph) for s in sides)
        if home is not None or not empty:
            found.append(layer)
    return tuple(found)


def removed_by_rewrites(before: Compiled, after: Compiled) -> dict[str, str]:
    """The rewrite that removes a node, by the names of the nodes that are gone."""
    rewrites = {
        name: outcome.rewrite
        for outcome in reversed(after.outcomes)
        if outcome.reason is None
        for name in outcome.nodes
    }
    gone = {node.name for _, node in before.graph} - {node.name for _, node in after.graph}
    found: dict[str, str] = {}
    for _, node in reversed(before.graph):
        if node.name in gone and node.name in rewrites:
            found[node.name] = rewrites[node.name]
        for name in node.inputs:  # what only a replaced node read goes with it
            if name in gone and node.name in found:
                found.setdefault(name, found[node.name])
    return found


def homes_of(operators: list[tuple[Paths, str]]) -> list[str]:
    """Paths of the layers: the modules that call a recurrence, or else any operator of ours.

    A module inside of another one is a part of that.
    """
    recurrent = [path for (path,), name in operators if name.split(".")[0] in RECURRENCES]
    paths = list(dict.fromkeys(recurrent or [path for (path,), _ in operators]))
    return [path for path in paths if home_of((path,), [p for p in paths if p != path]) is None]


def home_of(paths: Paths, homes: list[str]) -> str | None:
    """The layer that most of the modules are or are in, of two the first."""

    def home(path: str) -> str | None:
        return next((h for h in homes if not h or path == h or path.startswith(f"{h}.")), None)

    return max(Counter(map(home, paths or ("",))).items(), key=itemgetter(1))[0]


def part_of(graph: list[GraphNode], names: set[str]) -> tuple[GraphNode, ...]:
    """The nodes with these names, and the inputs of the graph that they read."""
    inner = [n for n in graph if n.name in names and n.operator not in ("placeholder", "output")]
    read = {name for node in inner for name in node.inputs}
    inputs = [replace(n, operator="input") for n in graph if n.operator == "placeholder"]
    return (*(node for node in inputs if node.name in read), *inner)


def fired(outcomes: list[Outcome]) -> tuple[Fired, ...]:
    return tuple(
        Fired(o.rewrite, short(o.operator), o.node, o.source, tuple(map(short, o.removed)))
        for o in outcomes
        if o.reason is None
    )


def near_misses(outcomes: list[Outcome]) -> tuple[NearMiss, ...]:
    return tuple(
        NearMiss(
            o.rewrite,
            short(o.operator),
            o.node,
            o.source,
            o.rejected_by,
            o.reason,
            o.blamed,
            o.blamed_source,
        )
        for o in outcomes
        if o.reason is not None and o.rejected_by is not None
    )
