"""What `kda_ops.explain` returns."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from kda_ops.explain import text
from kda_ops.explain.graph_drawing import GraphNode
from kda_ops.explain.page import page


@dataclass(frozen=True)
class Fired:
    """A rewrite that fired.

    Attributes:
        rewrite: Its name.
        operator: The operator whose call it matched.
        node: That call.
        source: The model's line of source of that call, empty if unknown.
        removed: Operators of the calls it replaced.
    """

    rewrite: str
    operator: str
    node: str
    source: str
    removed: tuple[str, ...]


@dataclass(frozen=True)
class NearMiss:
    """A rewrite that matched its pattern but did not fire.

    Attributes:
        rewrite: Its name.
        operator: The operator whose call it matched.
        node: That call.
        source: The model's line of source of that call, empty if unknown.
        rejected_by: The check that rejected it, a key of `kda_ops.explain.text.CHECKS`.
        reason: Why, in a sentence.
        blamed: The node that the reason is about; `node` if it names no other.
        blamed_source: That node's line of source.
    """

    rewrite: str
    operator: str
    node: str
    source: str
    rejected_by: str
    reason: str
    blamed: str
    blamed_source: str


@dataclass(frozen=True)
class Side:
    """A layer compiled without or with the rewrites.

    Attributes:
        launches: Names of the kernels it launches, in order: generated and hand-written.
        calls: Other calls, in order: GEMMs and operators without a kernel.
        bytes_moved: Bytes of intermediates through memory: each buffer that one kernel passes to
            another, written once and read once. Symbolic sizes count as their traced values.
        graph: Its nodes, in order.
        failed: Whether no code could be generated: then only the graph is known.
    """

    launches: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    bytes_moved: int = 0
    graph: tuple[GraphNode, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Layer:
    """One module with a recurrence, or everything outside of such modules.

    Attributes:
        path: As in `named_modules()`; empty for the model itself and outside of all layers.
        kind: Its class; empty outside of all layers.
        fired: Rewrites that fired in it.
        near_misses: Rewrites that nearly fired.
        before: Compiled without the rewrites.
        after: Compiled with them.
    """

    path: str
    kind: str
    fired: tuple[Fired, ...]
    near_misses: tuple[NearMiss, ...]
    before: Side
    after: Side

    @property
    def title(self) -> str:
        """Its path and class."""
        if not self.kind:
            return "outside of the layers"
        return f"{self.path}  {self.kind}".strip()

    @property
    def bytes_saved(self) -> int:
        """Bytes that no longer go through memory; negative if more do, 0 if they are unknown."""
        if self.failed:
            return 0
        return self.before.bytes_moved - self.after.bytes_moved

    @property
    def failed(self) -> bool:
        """Whether no code could be generated, without or with the rewrites."""
        return self.before.failed or self.after.failed

    def equal_but_for_names(self, other: "Layer") -> bool:
        """Whether another layer's report is the same except for node names."""

        def content(layer: Layer) -> tuple[object, ...]:
            sides = (layer.before, layer.after)
            return (
                layer.kind,
                [(f.rewrite, f.removed, f.source) for f in layer.fired],
                [(n.rewrite, n.rejected_by, n.source, n.blamed_source) for n in layer.near_misses],
                [replace(side, graph=()) for side in sides],
            )

        return content(self) == content(other)


@dataclass(frozen=True)
class Explanation:
    """What the graph rewrites change in a model; `str()` gives a report.

    Attributes:
        device: The device for which code was generated.
        shapes: `static` or `dynamic`.
        layers: In the order of the graph; the part outside of all layers comes last.
        failures: Why no code could be generated without and with the rewrites; empty if it was.
    """

    device: str
    shapes: str
    layers: tuple[Layer, ...]
    failures: tuple[str, str] = ("", "")

    @property
    def launches(self) -> tuple[int, int]:
        """Kernel launches of the whole graph, before and after; 0 where no code was generated."""
        before = sum(len(layer.before.launches) for layer in self.layers)
        return before, sum(len(layer.after.launches) for layer in self.layers)

    @property
    def bytes_saved(self) -> int:
        """Bytes that no longer go through memory, in the whole graph."""
        return sum(layer.bytes_saved for layer in self.layers)

    def distinct_layers(self) -> list[tuple[Layer, list[Layer]]]:
        """Each layer that differs from those before it, with the later ones equal to it."""
        groups: list[tuple[Layer, list[Layer]]] = []
        for layer in self.layers:
            for first, others in groups:
                if first.equal_but_for_names(layer):
                    others.append(layer)
                    break
            else:
                groups.append((layer, []))
        return groups

    def summary(self) -> str:
        """The whole graph in one line."""
        if any(self.failures):
            return "whole graph: " + "; ".join(self.without_code())
        before, after = self.launches
        saved = text.saved(self.bytes_saved)
        return f"whole graph: {before} -> {after} launches, {saved} through memory"

    def without_code(self) -> list[str]:
        """Which sides have no generated code, and why."""
        before, after = self.failures
        if before == after:
            return [f"no code with or without the rewrites: {before}"] if before else []
        both = (("without", before), ("with", after))
        return [f"no code {how} the rewrites: {why}" for how, why in both if why]

    def __str__(self) -> str:
        lines = [f"compiled for {self.device}, {self.shapes} shapes"]
        for layer, others in self.distinct_layers():
            lines += ["", layer.title, *(f"  {line}" for line in text.text_of(layer))]
            if others:
                lines.append(f"  the same in {', '.join(other.path for other in others)}")
        return "\n".join([*lines, "", self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers, texts, lists and dicts, without the graphs."""
        data = asdict(self)
        for layer in data["layers"]:
            for side in ("before", "after"):
                del layer[side]["graph"]
        return data | {"launches": self.launches, "bytes_saved": self.bytes_saved}

    def to_html(self) -> str:
        """The same as a self-contained page, with drawings of the graphs before and after."""
        return page(self)
