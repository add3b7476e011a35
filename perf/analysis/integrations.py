"""What the pages on integrations say, from the rows of runs: targets and all rows of a stage."""

from collections.abc import Sequence
from typing import Any

from perf.analysis import targets
from perf.analysis.pages import table_row
from perf.harness.runs import short_number

WORDS = ("what", "case", "provider")
TIMES = {"us": "queued, ms", "eager_us": "one call, ms", "kernel_us": "kernels, ms"}
Result = dict[str, Any]
MEANING = (
    "*Queued*: calls that follow one another. *One call*: on an idle GPU, what the host does "
    "included. *Kernels*: the sum of their times."
)
CHECKED = (
    "*RMSE*: of logits, to those of the unmodified model in fp32, as a multiple of the unmodified "
    "model's own. *Compiling*: the first call."
)


def row_table(rows: Sequence[Result]) -> str:
    """A Markdown table of what was timed; of compiling and errors where that is known of a row."""
    more = {"compile_seconds": "compiling, s", "error_ratio": "RMSE"}
    more = {key: name for key, name in more.items() if any(key in row for row in rows)}
    columns = (*WORDS, *TIMES.values(), "launches", *more.values())
    numbers = len(columns) - len(WORDS)
    lines = [table_row(columns), "|" + " --- |" * len(WORDS) + " ---: |" * numbers]
    for row in rows:
        known = (row.get(key) for key in more)
        cells = (
            *(row["stage"], row["case"], row["provider"]),
            *(short_number(row[key] * 1e-3) for key in TIMES),
            str(row["launches"]),
            *("" if x is None else short_number(x) for x in known),
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def integration_part(
    rows: Sequence[Result],
    judged: Sequence[Result],
    goals: Sequence[targets.Target],
    heading: str,
    machine: str,
) -> str:
    """The generated part of a page; empty without rows of it.

    Args:
        rows: Those of the stages of the page, each from the newest run that has it.
        judged: Rows of time, those of a case from one run, for targets.
        goals: The page's targets.
        heading: Its first line.
        machine: A line on the machine.
    """
    if not rows:
        return ""
    meaning = [MEANING, CHECKED] if any("error_ratio" in row for row in rows) else [MEANING]
    parts = [heading, machine, row_table(rows), " ".join(meaning), targets.table(judged, goals)]
    return "\n\n".join(parts)
