"""Generated parts of Markdown files."""

from collections.abc import Iterable
from pathlib import Path


def table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_between(path: Path, begin: str, text: str, end: str) -> None:
    """Replaces the text between two markers of a Markdown file.

    Raises:
        ValueError: The file lacks the markers.
    """
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{path} must hold {begin} and then {end} once each")
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    newline = "\n" if text else ""
    path.write_text(f"{head}{begin}\n{text}{newline}{end}{tail}")
