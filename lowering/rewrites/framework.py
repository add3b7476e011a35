"""What every graph rewrite shares: what is checked, replacing a part of a graph, and a log of it.

Rewrites run on Inductor's post-grad graph, after Inductor's own patterns. The graph is functional
there, so a write of a state between two operators is an edge like any other (`POST_GRAD`). In
training those of plain PyTorch also run before autograd, which then sees operators with gradients
of their own (`BEFORE_AUTOGRAD`), and those of a forward with its gradient run on the joint graph,
before it is parted in two (`JOINT`).

A rewrite is three functions:

* pattern: the nodes that one call and its surroundings are made of, or None
  (`kda_ops.lowering.graph.matching`);
* guard: a `Refusal`, why they can not be replaced, or None;
* replacement: new nodes in the place of the old outputs (`kda_ops.lowering.graph.emitting`).

What holds for every rewrite is checked here: nothing that disappears is used elsewhere, and what
the new node reads does not depend on what it replaces.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.fx_passes.post_grad import pass_patterns
from torch._inductor.pattern_matcher import stable_topological_sort

from kda_ops._library import REFERENCE_NAMESPACE
from kda_ops._tracing import hint
from kda_ops.lowering.compat import refresh_users
from kda_ops.lowering.graph.emitting import UnknownSizeError
from kda_ops.lowering.graph.matching import (
    Call,
    Refusal,
    is_lossless_cast,
    is_view,
    operator_of,
    value,
)
from kda_ops.lowering.graph.provenance import inherit, layer_of, source_of
from kda_ops.lowering.graph.sizes import share_sizes, sizes_for
from kda_ops.lowering.graph.snapshots import place_copies

logger = logging.getLogger("kda_ops.lowering")
# what activation checkpointing and the partitioner read of a node
PARTED_BY = ("recompute", "ac_graph_id", "partitioner_tag", "seq_nr")


@dataclass(frozen=True)
class Outcome:
    """Result of one attempted match.

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
        rejected_by: `guard` of the rewrite, `has_external_users`, `creates_cycle` or `replacement`;
            None if it fired.
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
    rejected_by: str | None = None
    blamed: str = ""
    blamed_source: str = ""

    def __str__(self) -> str:
        where = f"{self.layer or 'graph'}: {self.node}"
        if self.reason is not None:
            return f"{self.rewrite} did not fire at {where}: {self.reason}"
        replaced = ", ".join(self.removed) or "plain PyTorch"
        return f"{self.rewrite} fired at {where}, replaces {replaced}"


@dataclass
class Match:
    """A part of a graph that a pattern recognised.

    Attributes:
        inner: Nodes that disappear.
        outputs: Those of them whose values live on, computed by the replacement.
        inputs: Nodes that the replacement reads.
        values: What the guard and the replacement need to know.
        parts: Of what is replaced in two places, a forward and its gradient, each part.
        anchor: The call that stands for it, if that is not the one that was looked at.
    """

    inner: list[fx.Node]
    outputs: list[fx.Node]
    inputs: list[fx.Node]
    values: dict[str, Any] = field(default_factory=dict)
    parts: "tuple[Match, ...]" = ()
    anchor: fx.Node | None = None

    def __post_init__(self) -> None:
        self.inner = list(dict.fromkeys(self.inner))


@dataclass
class Attempt:
    """A match, and what became of it.

    Attributes:
        outcome: What is reported.
        anchor: The call that stands for the match.
        replaced: What took whose place.
    """

    outcome: Outcome
    anchor: fx.Node
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def refuse(self, rejected_by: str, refusal: Refusal) -> None:
        self.outcome = refused(self.outcome, self.anchor, rejected_by, refusal)


@dataclass(frozen=True)
class Rewrite:
    """One rewrite; `anchors` are the operators at which its pattern is tried."""

    name: str
    anchors: tuple[Any, ...]
    pattern: Callable[[fx.Node], Match | None]
    guard: Callable[[Match], Refusal | None]
    replacement: Callable[[fx.Graph, Match], dict[fx.Node, fx.Node]]

    def __call__(self, graph: fx.Graph) -> "list[Attempt]":
        """Replaces what matches; returns every attempt, which the caller reports."""
        attempts: list[Attempt] = []
        for node in [node for node in graph.nodes if operator_of(node) in self.anchors]:
            if node._erased:
                continue
            match = self.pattern(node)
            if match is None:
                continue
            node = match.anchor or node
            match.inner = list(dict.fromkeys([*match.inner, *sizes_for(match.inner)]))
            attempt = Attempt(outcome_of(self.name, node, match), node)
            rejected = self._rejected(match) or self._replace(graph, node, match, attempt.replaced)
            if rejected is not None:
                attempt.refuse(*rejected)
            attempts.append(attempt)
        return attempts

    def _rejected(self, match: Match) -> tuple[str, Refusal] | None:
        """The first check that rejects a match, and why."""
        checks = {
            "guard": self.guard,
            "has_external_users": has_external_users,
            "creates_cycle": creates_cycle,
        }
        for name, check in checks.items():
            if (refusal := check(match)) is not None:
                return name, refusal
        return None

    def _replace(
        self, graph: fx.Graph, anchor: fx.Node, match: Match, replaced: dict[fx.Node, fx.Node]
    ) -> tuple[str, Refusal] | None:
        last = max(match.inner)
        before = last.prev
        try:
            with graph.inserting_before(last):
                news = self.replacement(graph, match)
        except UnknownSizeError as error:
            while last.prev is not before:
                graph.erase_node(last.prev)
            return "replacement", Refusal(str(error))
        made = last.prev
        while made is not before:
            describe(made, anchor)
            made.meta["rewrite"] = self.name
            made = made.prev
        replaced |= news
        for old, new in news.items():
            old.replace_all_uses_with(new)
        out_of_order = any(user < new for new in news.values() for user in new.users)
        unused = [node for inner in match.inner for node in inner.all_input_nodes]
        for node in sorted(match.inner, reverse=True):
            graph.erase_node(node)
        for new in news.values():
            refresh_users(new)
        while unused:  # casts and views of what was read, which would count as users of it
            node = unused.pop()
            if not node._erased and not node.users and (is_view(node) or is_lossless_cast(node)):
                unused += node.all_input_nodes
                graph.erase_node(node)
        if out_of_order:
            stable_topological_sort(graph)
        return None


def describe(node: fx.Node, anchor: fx.Node) -> None:
    """Gives a new node its place in the model, and its operator a place in kernel names."""
    inherit(node, anchor)
    if isinstance(node.target, torch._ops.OpOverload):
        node.meta.setdefault("original_aten", node.target)


def place(node: fx.Node, old: fx.Node) -> None:
    """Lets the partitioner save, recompute and place a node as it would an old one."""
    node.meta |= {key: old.meta[key] for key in PARTED_BY if key in old.meta}


def runs_on_gpu(x: torch.Tensor) -> bool:
    """Whether a graph with this tensor is compiled for a GPU, be it a virtual one."""
    return x.device.type == "cuda" or bool(_virtual_gpus)


@contextmanager
def for_virtual_gpu() -> Iterator[None]:
    """Graphs on the CPU are rewritten as those on a GPU."""
    _virtual_gpus.append(True)
    try:
        yield
    finally:
        _virtual_gpus.pop()


def has_external_users(match: Match) -> Refusal | None:
    """Why what disappears is still needed."""
    inner = set(match.inner)
    for node in match.inner:
        if node in match.outputs:
            continue
        for user in node.users:
            if user not in inner:
                if user.op == "output":
                    return Refusal(f"{node.name} is returned", node)
                return Refusal(f"{node.name} is also used by {user.name}", user)
    return None


def creates_cycle(match: Match) -> Refusal | None:
    """Why the replacement could not come before everything that uses it."""
    for part in match.parts:
        if (refusal := creates_cycle(part)) is not None:
            return refusal
    if match.parts:
        return None
    inner, first = set(match.inner), min(match.inner)
    pending, seen = list(match.inputs), set()
    while pending:
        node = pending.pop()
        if node in inner:
            return Refusal(f"an input depends on {node.name}", node)
        if node in seen or node < first:
            continue
        seen.add(node)
        pending += node.all_input_nodes
    return None


def outcome_of(name: str, node: fx.Node, match: Match) -> Outcome:
    """The outcome of a rewrite that fires."""
    removed = [call for call in map(Call.of, match.inner) if call]
    kept = [call.result(i) for call in removed for i in range(call.results)]
    saved = sum(_bytes(node) for node in kept if node is not None and node not in match.outputs)
    return Outcome(
        name,
        node.name,
        layer_of(node),
        removed=tuple(str(call.op) for call in removed),
        bytes_saved=2 * saved,
        nodes=tuple(inner.name for inner in match.inner),
        operator=str(operator_of(node)),
        source=source_of(node),
    )


def refused(outcome: Outcome, anchor: fx.Node, rejected_by: str, refusal: Refusal) -> Outcome:
    """The outcome of a match that a check rejects."""
    blamed = refusal.node or anchor
    return replace(
        outcome,
        reason=refusal.reason,
        rejected_by=rejected_by,
        blamed=blamed.name,
        blamed_source=source_of(blamed),
    )


def report(attempts: list[Attempt]) -> None:
    """Logs outcomes and gives them to whoever is recording."""
    for attempt in attempts:
        outcome = attempt.outcome
        logger.log(logging.INFO if outcome.reason is None else logging.DEBUG, "%s", outcome)
        for listener in _listeners:
            listener.append(outcome)


def _bytes(node: fx.Node) -> int:
    x = value(node)
    if not isinstance(x, torch.Tensor):
        return 0
    sizes = [hint(size) if isinstance(size, torch.SymInt) else size for size in x.shape]
    known = [size for size in sizes if size is not None]
    return x.dtype.itemsize * math.prod(known) if len(known) == len(sizes) else 0


BEFORE_AUTOGRAD: list[Rewrite] = []  # of a training graph
JOINT: list[Rewrite] = []  # of a forward with its gradient, before they are parted
POST_GRAD: list[Rewrite] = []  # of every graph
_listeners: list[list[Outcome]] = []
_virtual_gpus: list[bool] = []


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
    pattern: Callable[[fx.Node], Match | None],
    guard: Callable[[Match], Refusal | None],
    replacement: Callable[[fx.Graph, Match], dict[fx.Node, fx.Node]],
    *,
    stages: tuple[list[Rewrite], ...] = (POST_GRAD,),
) -> None:
    """Adds a rewrite, in each of some stages, behind those that are registered."""
    for stage in stages:
        stage.append(Rewrite(name, anchors, pattern, guard, replacement))


class JointRewrites:
    """The rewrites of a forward with its gradient, in the shape of one of Inductor's pattern passes
    over the joint graph.
    """

    def apply(self, gm: fx.GraphModule | fx.Graph) -> int:
        graph = gm if isinstance(gm, fx.Graph) else gm.graph
        called = {call.op.namespace for call in map(Call.of, graph.nodes) if call is not None}
        if called and REFERENCE_NAMESPACE not in called:
            for step in JOINT:
                report(step(graph))
        return 0


class Rewrites:
    """All rewrites in sequence, in the shape of one of Inductor's own pattern passes.

    A graph that calls the definition of an operator (`kda_ops.config.impl`) stays as it is.
    """

    def apply(self, gm: fx.GraphModule | fx.Graph) -> int:
        graph = gm if isinstance(gm, fx.Graph) else gm.graph
        called = {call.op.namespace for call in map(Call.of, graph.nodes) if call is not None}
        if called:
            share_sizes(graph)
            for step in POST_GRAD if REFERENCE_NAMESPACE not in called else ():
                report(step(graph))
            place_copies(graph)
        return 0


def install_rewrites() -> None:
    """Runs the rewrites after Inductor's patterns, in no slot that belongs to the user."""
    for passes, ours in ((pass_patterns, Rewrites), (joint_graph.pass_patterns, JointRewrites)):
        if not any(isinstance(patterns, ours) for patterns in passes):
            passes.append(ours())
