"""What a page says of training, from the rows of runs: targets, errors of gradients, all rows."""

from collections.abc import Iterable, Sequence
from typing import Any

from perf.analysis import targets
from perf.analysis.pages import table_row
from perf.baselines.cudnn import CUDNN
from perf.harness.runs import short_number

COLUMNS = (
    *("stage", "case", "provider", "us", "eager call, us", "kernels, us", "roofline, us"),
    *("launches", "peak, MB", "baseline / ours"),
)
WORDS = 3  # of these columns
ERRORS = "error_d"
Result = dict[str, Any]


def row_table(rows: Iterable[Result]) -> str:
    """A Markdown table of what was timed."""
    lines = [table_row(COLUMNS), "|" + " --- |" * WORDS + " ---: |" * (len(COLUMNS) - WORDS)]
    for row in rows:
        ratio, peak = row.get("baseline_ratio"), row.get("peak_MB")
        times = (row[key] for key in ("us", "eager_us", "kernel_us", "roofline_us"))
        cells = (
            *(row["stage"], row["case"], row["provider"], *map(short_number, times)),
            str(row["launches"]),
            "" if peak is None else short_number(peak),
            "" if ratio is None else f"{ratio:.2f}",
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def error_table(rows: Sequence[Result]) -> str:
    """A Markdown table of relative errors of gradients."""
    keys = [key for key in rows[0] if key.startswith(ERRORS)]
    names = [f"`{key.removeprefix(ERRORS)}`" for key in keys]
    lines = [
        table_row(["gates and keys", "provider", *names]),
        "| --- | --- |" + " ---: |" * len(keys),
    ]
    for row in rows:
        lines.append(
            table_row([row["case"], row["provider"], *(f"{row[key]:.1e}" for key in keys)])
        )
    return "\n".join(lines)


def training_part(rows: Sequence[Result], judged: Sequence[Result], head: Sequence[str]) -> str:
    """The generated part of a page on training; empty without rows of it.

    Args:
        rows: Those of training that were timed, each from the newest run that has it.
        judged: Rows of accuracy and time, those of a case from one run, for targets.
        head: Paragraphs on the machine and with a picture.
    """
    if not rows:
        return ""
    errors = [row for row in judged if row["stage"] == targets.ACCURACY["gradient_accuracy"]]
    parts = ["## Speed, memory and errors", *head, targets.table(judged, targets.TRAINING)]
    if any(row["provider"].startswith(CUDNN) for row in rows):
        parts.append(f"{CUDNN} has less to do: norms, gate and sigmoid are not in its time.")
    if errors:
        said = (
            "Relative errors (Frobenius) of gradients, against the recurrence in fp64. FLA has "
            "norms, gate and sigmoid inside, as `fused` has; as operators of their own they round "
            "q, k and beta to bf16 in between:"
        )
        parts += [said, error_table(errors)]
    parts += ["<details>\n<summary>All rows</summary>", row_table(rows), "</details>"]
    return "\n\n".join(parts)
