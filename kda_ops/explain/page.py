"""An explanation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from kda_ops.explain.graph_drawing import drawing
from kda_ops.explain.text import (
    blame,
    bytes_moved,
    called,
    fired_at,
    launched,
    refusal,
    replaces,
    saved,
)

if TYPE_CHECKING:
    from kda_ops.explain.result import Explanation, Layer, Side

STYLE = """
:root { color-scheme: light dark; --line: #8a94a6; --box: #eef1f5; --text: #1c2430; --page: #fff;
  --before: #ffdf9e; --after: #b9e8c1; --miss: #d1242f; }
@media (prefers-color-scheme: dark) { :root { --line: #7d8590; --box: #262c36; --text: #e6edf3;
  --page: #0d1117; --before: #6b4a00; --after: #1b5a2a; --miss: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem;
  padding: 0 1rem; color: var(--text); background: var(--page); }
code, table, svg text { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
.miss { color: var(--miss); }
.graphs { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
figure { margin: 0; flex: 1 1 30rem; min-width: 0; }
figure div { overflow: auto; max-height: 90vh; border: 1px solid var(--line); }
svg text { font-size: 11px; text-anchor: middle; fill: var(--text); }
svg path { fill: none; stroke: var(--line); opacity: .6; }
svg rect { fill: var(--box); stroke: var(--line); }
svg .input rect { fill: none; stroke-dasharray: 3 2; }
.before svg .fused rect { fill: var(--before); }
.after svg .fused rect { fill: var(--after); }
svg .marked rect { stroke: var(--miss); stroke-width: 2; }
.key { padding: 0 .4rem; border: 1px solid var(--line); border-radius: 3px; }
""".strip()
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kda-ops explain</title>
<style>
{style}
</style>
</head>
<body>
<h1>Explaining fusions</h1>
<p>Compiled for {device}, {shapes} shapes. {summary}.</p>
<p>In the graphs, inputs are above and results below; point at a node to see its line of source.
<span class="key" style="background: var(--before)">removed by a rewrite</span>
<span class="key" style="background: var(--after)">made by a rewrite</span>
<span class="key" style="border: 2px solid var(--miss)">a rewrite did not fire because of it</span>
</p>
"""


def page(explanation: Explanation) -> str:
    """The whole page."""
    parts = [
        HEAD.format(
            style=STYLE,
            device=escape(explanation.device),
            shapes=explanation.shapes,
            summary=escape(explanation.summary().capitalize()),
        )
    ]
    for layer, others in explanation.distinct_layers():
        parts.append(section(layer, [other.title for other in others]))
    return "\n".join([*parts, "</body>\n</html>\n"])


def section(layer: Layer, others: list[str]) -> str:
    """One layer."""
    same = f"<p>The same in {escape(', '.join(others))}.</p>" if others else ""
    fired = [(fired_at(f), f.source, replaces(f)) for f in layer.fired]
    missed = [(fired_at(m), m.source, refusal(m), *blame(m)) for m in layer.near_misses]
    marked = frozenset(m.blamed for m in layer.near_misses)
    graphs = "\n".join(
        f'<figure class="{when}"><figcaption>{when} the rewrites</figcaption>\n'
        f"<div>{drawing(side.graph, f'{layer.title}, {when} the rewrites', marked)}</div></figure>"
        for when, side in (("before", layer.before), ("after", layer.after))
    )
    return f"""<section>
<h2>{escape(layer.title)}</h2>
{same}
<h3>Fired</h3>
{listed(fired)}
<h3 class="miss">Nearly fired</h3>
{listed(missed)}
{table(layer)}
<div class="graphs">
{graphs}
</div>
</section>"""


def listed(items: Iterable[tuple[str, ...]]) -> str:
    """A list; the first line of each item stands out."""
    rows = [
        f"<li><strong>{escape(first)}</strong>"
        + "".join(f"<br><code>{escape(line)}</code>" for line in rest if line)
        + "</li>"
        for first, *rest in items
    ]
    return "<ul>\n" + "\n".join(rows) + "\n</ul>" if rows else "<p>none</p>"


def table(layer: Layer) -> str:
    """Launches, other calls and bytes, before and after."""

    def cells(side: Side) -> list[str]:
        return [
            "<br>".join(map(escape, lines))
            for lines in (launched(side), called(side), [bytes_moved(side)])
        ]

    names = ("kernel launches", "other calls", "intermediates written and read")
    rows = "\n".join(
        f"<tr><th>{name}</th><td>{old}</td><td>{new}</td></tr>"
        for name, old, new in zip(names, cells(layer.before), cells(layer.after), strict=True)
    )
    change = "" if layer.failed else f"\n<p>{escape(saved(layer.bytes_saved))} through memory.</p>"
    return f"<table>\n<tr><th></th><th>before</th><th>after</th></tr>\n{rows}\n</table>{change}"
