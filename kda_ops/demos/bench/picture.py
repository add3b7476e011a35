"""The times as a picture: one bar each, in an SVG of plain shapes and text."""

from html import escape

ROW, BAR, WIDTH, CHARACTER, MARGIN = 30, 18, 420, 7.3, 12
OURS, OTHERS = "#6d4fc2", "#9aa0a8"


def bars(title: str, rows: list[tuple[str, float, str, bool]]) -> str:
    """An `<svg>` document.

    Args:
        title: Above the bars.
        rows: For each bar a name, its length, the text after it, and whether it is ours.
    """
    left = MARGIN + CHARACTER * max(len(name) for name, *_ in rows) + 10
    right = CHARACTER * max(len(text) for _, _, text, _ in rows) + 10
    longest = max(length for _, length, _, _ in rows)
    width, height = left + WIDTH + right + MARGIN, 44 + ROW * len(rows) + MARGIN
    shapes = [f'<text x="{MARGIN}" y="24" font-weight="bold">{escape(title)}</text>']
    for i, (name, length, text, ours) in enumerate(rows):
        y = 44 + ROW * i
        long = max(WIDTH * length / longest, 1.0)
        shapes += [
            f'<text x="{left - 8:.0f}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left:.0f}" y="{y}" width="{long:.1f}" height="{BAR}" rx="2" '
            f'fill="{OURS if ours else OTHERS}"/>',
            f'<text x="{left + long + 6:.1f}" y="{y + 14}">{escape(text)}</text>',
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="monospace" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )
