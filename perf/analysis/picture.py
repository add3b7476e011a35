"""The picture of a run: for each workload with a target, stacked bars of its stages' times, ours
and the baselines', and the roofline as a line.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.analysis.targets import TARGETS, Target
from perf.harness.rows import OURS
from perf.harness.runs import short_number

Row = dict[str, Any]
# Stages of a layer and their kernels, ours and the baselines'; the first match counts.
STAGES = {
    "projections": r"nvjet|gemm|cutlass|cublas|splitK|addmm|_mm_|Cijk",
    "convolution": r"conv",
    "decode step": r"kda_decode|recurrent",
    "chunks: gradient": r"chunk_kda_bwd_kernel|chunk_gradient|general_(chunk|gate)"
    r"|backward_(tiles|keys)|parameter_sums",
    "chunks: scan": r"chunk_(scan|segments)|chunk_gated_delta_rule|chunk_gla_fwd_kernel_o|delta_h"
    r"|(states|general)_(forward|backward)",
    "chunks: prepare": r"prepare|intra|inter_solve|recompute_w_u|chunk_inputs",
    "norm of q and k": r"l2norm",
    "output norm": r"rms_norm|layer_norm",
    "gate": r"gate|cumsum",
    "beta, fills, copies": r"",
}
COLOURS = {
    "projections": "#9aa5b1",
    "convolution": "#2a9d8f",
    "decode step": "#6d4c9f",
    "chunks: gradient": "#b23a6b",
    "chunks: scan": "#1b5e9b",
    "chunks: prepare": "#5fa8d3",
    "norm of q and k": "#e9c46a",
    "output norm": "#e76f51",
    "gate": "#f4a261",
    "beta, fills, copies": "#d5d9de",
}
COLUMNS = 3


def stage_of(kernel: str) -> str:
    """The stage that a kernel's name belongs to."""
    return next(stage for stage, names in STAGES.items() if re.search(names, kernel))


def stacked(row: Row) -> dict[str, float]:
    """Microseconds of each stage of a row, in order. The profile of one call gives the shares; the
    measured time is their sum.
    """
    total = sum(us for _, us in row["kernels"].values())
    shares = dict.fromkeys(STAGES, 0.0)
    for kernel, (_, us) in row["kernels"].items():
        shares[stage_of(kernel)] += us * row["us"] / total
    return {stage: us for stage, us in shares.items() if us > 0}


def panels(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[tuple[str, list[Row]]]:
    """For each workload with a target: the baselines, fastest first, then our fastest provider."""
    found = []
    for stage, case in dict.fromkeys((target.stage, target.case) for target in targets):
        own = [r for r in rows if (r["stage"], r["case"]) == (stage, case) and r.get("kernels")]
        ours = [row for row in own if row["provider"].startswith(OURS)]
        baselines = sorted((row for row in own if row not in ours), key=lambda row: row["us"])
        if ours:
            found.append((f"{stage}  {case}", [*baselines, min(ours, key=lambda row: row["us"])]))
    return found


def draw(path: Path, rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> None:
    """Writes the PNG; the same rows and the same matplotlib give the same bytes.

    Raises:
        ValueError: No row belongs to a workload with a target.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = panels(rows, targets)
    if not found:
        raise ValueError("rows must hold one of the works with a target, got none")
    lines = -(-len(found) // COLUMNS)
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(5 * COLUMNS, 1.35 * lines + 1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (title, members) in zip(axes.flat, found, strict=False):
        for place, row in enumerate(members):
            left = 0.0
            for stage, us in stacked(row).items():
                axis.barh(place, us, left=left, color=COLOURS[stage], height=0.7)
                left += us
            axis.text(left, place, f" {short_number(row['us'])}", va="center", fontsize=8)
        axis.axvline(members[-1]["roofline_us"], color="black", linewidth=1.2)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_yticks(range(len(members)), [row["provider"] for row in members], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    shown = [s for s in STAGES if any(s in stacked(row) for _, m in found for row in m)]
    handles: list[Any] = [Patch(color=COLOURS[stage], label=stage) for stage in shown]
    handles.append(Line2D([], [], color="black", label="roofline"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    first = found[0][1][0]
    figure.suptitle(f"{first['gpu']}, median microseconds", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
