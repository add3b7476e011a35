"""A graph as an SVG: layers of boxes from the inputs down, made of plain shapes and text.

A node is placed one row below the lowest node it reads. Within a row, nodes are ordered by the
positions of their neighbors, in a few sweeps down and up.
"""

from dataclasses import dataclass, replace
from html import escape

CHARACTER, LINE = 6.2, 13  # of 11 px monospace text
PADDING, GAP, BETWEEN_ROWS, MARGIN = 8, 14, 30, 10
SWEEPS = 4


@dataclass(frozen=True)
class GraphNode:
    """One node of the graph before or after the rewrites.

    Attributes:
        name: Its name in the graph.
        operator: What it calls, `input` for an input of the graph.
        inputs: Names of the nodes it reads.
        value: Dtype and shape of its result, empty if it is not one tensor.
        source: The model's line of source, empty if unknown.
        rewrite: Before: the rewrite that removes it. After: the one that made it. Else None.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    value: str = ""
    source: str = ""
    rewrite: str | None = None


Rows = list[list[GraphNode]]
Place = tuple[float, float, float, float]  # x, y, width, height


def drawing(graph: tuple[GraphNode, ...], label: str, marked: frozenset[str]) -> str:
    """An `<svg>` element.

    Args:
        graph: The nodes in order. Other nodes that they read are drawn as inputs.
        label: Text alternative for the picture.
        marked: Names of nodes that are outlined.
    """
    nodes = joined(graph)
    rows = rows_of(nodes)
    order(rows)
    places, width, height = placed(rows)
    shapes = []
    for node in nodes:
        x, y, w, _ = places[node.name]
        for name in node.inputs:
            x0, y0, w0, h0 = places[name]
            start, end, middle = y0 + h0, y, (y0 + h0 + y) / 2
            a, b = x0 + w0 / 2, x + w / 2
            shapes.append(
                f'<path d="M{a:.1f} {start:.1f}C{a:.1f} {middle:.1f} {b:.1f} {middle:.1f} '
                f'{b:.1f} {end:.1f}"/>'
            )
    for node in nodes:
        shapes += box(node, places[node.name], node.name in marked)
    return (
        f'<svg width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )


def joined(graph: tuple[GraphNode, ...]) -> list[GraphNode]:
    """The nodes without getitem nodes, with everything they read."""
    names: dict[str, str] = {}
    kept: dict[str, GraphNode] = {}
    for node in graph:
        if node.operator == "getitem" and node.inputs and node.inputs[0] in names:
            names[node.name] = names[node.inputs[0]]
            continue
        names[node.name] = node.name
        inputs = tuple(dict.fromkeys(names.get(name, name) for name in node.inputs))
        kept[node.name] = replace(node, inputs=inputs)
    read = dict.fromkeys(name for node in kept.values() for name in node.inputs)
    outside = [GraphNode(name, "input", (), name) for name in read if name not in kept]
    return [*outside, *kept.values()]


def rows_of(nodes: list[GraphNode]) -> Rows:
    """The nodes by rows; an input is placed just above its first reader."""
    depth: dict[str, int] = {}
    for node in nodes:
        if node.operator != "input":
            depth[node.name] = 1 + max((depth.get(name, 0) for name in node.inputs), default=0)
    for node in nodes:
        if node.operator == "input":
            readers = [depth[other.name] for other in nodes if node.name in other.inputs]
            depth[node.name] = min(readers, default=1) - 1
    rows: Rows = [[] for _ in range(1 + max(depth.values(), default=0))]
    for node in nodes:
        rows[depth[node.name]].append(node)
    return rows


def order(rows: Rows) -> None:
    """Sorts every row by the mean position of its nodes' inputs, then of their users."""
    above = {node.name: list(node.inputs) for row in rows for node in row}
    below: dict[str, list[str]] = {name: [] for name in above}
    for name, inputs in above.items():
        for read in inputs:
            below[read].append(name)
    for sweep in range(SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            position = {
                node.name: (i + 0.5) / len(other) for other in rows for i, node in enumerate(other)
            }

            means = {}
            for node in row:
                near = (below if sweep % 2 else above)[node.name] or [node.name]
                means[node.name] = sum(position[name] for name in near) / len(near)
            row.sort(key=lambda node, means=means: means[node.name])  # type: ignore[misc]


def placed(rows: Rows) -> tuple[dict[str, Place], float, float]:
    """The place of every node, and the size of the picture."""
    widths = {
        node.name: 2 * PADDING + CHARACTER * max(map(len, lines(node))) for r in rows for node in r
    }
    spans = [sum(widths[n.name] for n in row) + GAP * max(0, len(row) - 1) for row in rows]
    total = max(spans, default=0)
    places: dict[str, Place] = {}
    y = float(MARGIN)
    for row, span in zip(rows, spans, strict=True):
        x = MARGIN + (total - span) / 2
        height = LINE * max((len(lines(node)) for node in row), default=0) + PADDING
        for node in row:
            places[node.name] = (x, y, widths[node.name], LINE * len(lines(node)) + PADDING)
            x += widths[node.name] + GAP
        y += height + BETWEEN_ROWS
    return places, total + 2 * MARGIN, y - BETWEEN_ROWS + MARGIN


def lines(node: GraphNode) -> list[str]:
    """The text in a box."""
    name = node.value or node.name if node.operator == "input" else node.operator
    return [name, node.value] if node.value and node.value != name else [name]


def box(node: GraphNode, place: Place, marked: bool) -> list[str]:
    """A rectangle with its text; pointing at it shows the node's name, rewrite and source."""
    x, y, w, h = place
    kind = "input" if node.operator == "input" else "fused" if node.rewrite else "plain"
    tooltip = [node.name, f"rewrite {node.rewrite}" if node.rewrite else "", node.source]
    shapes = [f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="4"/>']
    for i, text in enumerate(lines(node)):
        baseline = y + PADDING / 2 + LINE * (i + 0.8)
        shapes.append(f'<text x="{x + w / 2:.1f}" y="{baseline:.1f}">{escape(text)}</text>')
    return [
        f'<g class="{kind}{" marked" if marked else ""}">',
        f"<title>{escape(chr(10).join(filter(None, tooltip)))}</title>",
        *shapes,
        "</g>",
    ]
