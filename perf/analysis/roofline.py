"""Predicts times on other GPUs and tensor-parallel sizes: `python -m perf.analysis.roofline`.

Bytes and FLOPs come from the operators' `cases.py`, the time of each kernel on the H200 from the
newest committed run that has it. Each is scaled to another GPU by its bottleneck:

* `bytes`: by copy bandwidth; every head has its own bytes, so one of N ranks has 1/N of them.
* `flops`: by the rate of bf16 GEMMs; 1/N likewise.
* `work`: instructions of programs that fill the GPU, by multiprocessors and clock; 1/N.
* `chain`: sequential chunks or launches, by clock alone: more ranks do not shorten it until each
  has 8 heads left, which then take the measured time of 8 heads, in segments.

Never less than the kernel's roofline on that GPU. Other GPUs' ceilings are their data sheets',
times the fraction of its data sheet that the H200 reached. No other GPU was measured.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kda_ops._cases import operator_packages
from perf.analysis.pages import write_between
from perf.analysis.picture import stacked
from perf.analysis.report import newest
from perf.bench_layer import HIDDEN, TOKENS, WEIGHTS
from perf.harness.machine import HISTORY
from perf.harness.rows import OURS
from perf.harness.runs import read_run

BEGIN, END = "<!-- roofline:begin -->", "<!-- roofline:end -->"
RANKS = (1, 2, 4, 8)
BATCHES = (1, 64)
Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """Bytes and bf16 FLOPs per second, programs' speed, and link bandwidth per direction."""

    name: str
    bytes_per_second: float
    flops_per_second: float
    multiprocessors: int
    hertz: float
    link_bytes_per_second: float


# data sheets, dense bf16; the clock is the highest
SHEETS = [
    Gpu("A100 80GB", 2.039e12, 312e12, 108, 1.41e9, 300e9),
    Gpu("H100", 3.35e12, 989e12, 132, 1.98e9, 450e9),
    Gpu("H200", 4.8e12, 989e12, 132, 1.98e9, 450e9),
    Gpu("B200", 8.0e12, 2250e12, 148, 1.965e9, 900e9),
]
MEASURED = "H200"
ALL_REDUCE_SECONDS = 8e-6  # latency of a small one; assumed


@dataclass(frozen=True)
class Piece:
    """A kernel, or all kernels of a stage: bytes and FLOPs on a single rank, time on the measured
    GPU, and bottleneck; for a chain also its time from some number of ranks on.
    """

    name: str
    bytes_moved: int
    flops: int
    seconds: float
    limit: str
    shorter: tuple[int, float] | None = None

    def roofline(self, gpu: Gpu, ranks: int) -> float:
        needed = self.bytes_moved / gpu.bytes_per_second, self.flops / gpu.flops_per_second
        return max(needed) / ranks

    def predicted(self, gpu: Gpu, measured: Gpu, ranks: int) -> float:
        """Seconds on one of `ranks` GPUs."""
        slower = {
            "bytes": measured.bytes_per_second / gpu.bytes_per_second / ranks,
            "flops": measured.flops_per_second / gpu.flops_per_second / ranks,
            "work": measured.multiprocessors
            * measured.hertz
            / (gpu.multiprocessors * gpu.hertz * ranks),
            "chain": measured.hertz / gpu.hertz,
        }[self.limit]
        seconds = self.seconds
        if self.shorter is not None and ranks >= self.shorter[0]:
            seconds = self.shorter[1]
        return max(seconds * slower, self.roofline(gpu, ranks))


def case_of(operator: str, name: str) -> Any:
    """One of an operator's benchmark cases."""
    cases = importlib.import_module(f"{operator_packages()[operator]}.cases").CASES
    return next(case for case in cases if case.name == name)


def best(rows: Sequence[Row], stage: str, case: str) -> Row:
    """Our fastest provider of a case.

    Raises:
        ValueError: It was not measured.
    """
    found = [
        row
        for row in rows
        if (row["stage"], row["case"]) == (stage, case) and row["provider"].startswith(OURS)
    ]
    if not found:
        raise ValueError(f"rows must hold {stage} {case}, got none")
    return min(found, key=lambda row: row["us"])


def gpus(rows: Sequence[Row]) -> list[Gpu]:
    """The GPUs with their expected ceilings; those of the measured one are measured."""
    sheet = next(gpu for gpu in SHEETS if gpu.name == MEASURED)
    row = rows[-1]
    copy = row["copy_TB_per_s"] * 1e12 / sheet.bytes_per_second
    product = row["matmul_TFLOP_per_s"] * 1e12 / sheet.flops_per_second
    return [
        Gpu(
            gpu.name,
            gpu.bytes_per_second * copy,
            gpu.flops_per_second * product,
            gpu.multiprocessors,
            gpu.hertz,
            gpu.link_bytes_per_second,
        )
        for gpu in SHEETS
    ]


# Bottlenecks of the core's stages (`picture.STAGES`); their bytes are counted with the core's.
CORE = {"chunks: prepare": "work", "chunks: scan": "chain"}


def prefill_pieces(rows: Sequence[Row]) -> list[Piece]:
    """A layer at hidden 2304, H = 32, T = 8192, on one GPU."""
    conv = case_of("short_conv", "T8192-D12288")
    chunks = case_of("chunk_kda_gated", "norm-T8192-H32")
    norm = case_of("rms_norm_gated", "T8192-H32")
    core = stacked(best(rows, "core", "softplus-T8192-H32"))
    few = stacked(best(rows, "core", "softplus-T8192-H8"))
    share = chunks.bytes_moved // 2
    pieces = [
        Piece(
            stage,
            share,
            chunks.flops // 2,
            core.pop(stage) * 1e-6,
            limit,
            (32 // 8, few[stage] * 1e-6) if limit == "chain" else None,
        )
        for stage, limit in CORE.items()
        if stage in core
    ]
    rest = sum(core.values()) * 1e-6
    flops = 2 * TOKENS * WEIGHTS
    products = projections(best(rows, "layer", f"prefill-T{TOKENS}-H32"))
    return [
        Piece("projections", 2 * WEIGHTS, flops, products, "flops"),
        _piece("convolution", conv, best(rows, "short_conv", conv.name)),
        *pieces,
        *([Piece("gate and beta", 0, 0, rest, "bytes")] if rest else []),
        _piece("output norm", norm, best(rows, "rms_norm_gated", norm.name)),
    ]


def decode_pieces(rows: Sequence[Row], measured: Gpu, batch: int) -> list[Piece]:
    """A decode step of the layer. Its small GEMMs take the time of their bytes plus latency."""
    case = case_of("kda_decode", f"SD-batch{batch}-H32")
    weights, flops = 2 * WEIGHTS, 2 * batch * WEIGHTS
    seconds = max(weights / measured.bytes_per_second, flops / measured.flops_per_second)
    latency = projections(best(rows, "layer", f"decode-batch{batch}-H32")) - seconds
    return [
        Piece("projections", weights, flops, seconds, "bytes"),
        Piece("latency of projections", 0, 0, max(latency, 0.0), "chain"),
        _piece("decode step", case, best(rows, "kda_decode", case.name)),
    ]


def projections(layer: Row) -> float:
    """Seconds of a layer's GEMMs."""
    return stacked(layer)["projections"] * 1e-6


def _piece(name: str, case: Any, row: Row) -> Piece:
    return Piece(name, case.bytes_moved, case.flops, row["us"] * 1e-6, "bytes")


def all_reduce(gpu: Gpu, tokens: int, ranks: int) -> float:
    """Seconds to sum the layer's output, `[tokens, 2304]` in bf16, over the ranks."""
    if ranks == 1:
        return 0.0
    moved = 2 * (ranks - 1) / ranks * tokens * HIDDEN * 2
    return ALL_REDUCE_SECONDS + moved / gpu.link_bytes_per_second


def layer_seconds(
    pieces: Sequence[Piece], gpu: Gpu, measured: Gpu, ranks: int, tokens: int
) -> float:
    parts = sum(piece.predicted(gpu, measured, ranks) for piece in pieces)
    return parts + all_reduce(gpu, tokens, ranks)


def _us(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def report(rows: Sequence[Row]) -> str:
    """Both tables in Markdown.

    Raises:
        ValueError: A row that the model needs is missing.
    """
    found = gpus(rows)
    measured = next(gpu for gpu in found if gpu.name == MEASURED)
    pieces = prefill_pieces(rows)
    heads = [f"{gpu.name}{' (measured)' if gpu is measured else ''}" for gpu in found]
    lines = [
        f"Predictions in us by `python -m perf.analysis.roofline`, "
        f"extrapolated from the {MEASURED} column. "
        "The roofline is in parentheses.",
        "",
        "| prefill, T = 8192, H = 32 | limit | " + " | ".join(heads) + " |",
        "| --- | --- |" + " ---: |" * len(found),
    ]
    for piece in pieces:
        cells = [
            f"{_us(piece.predicted(gpu, measured, 1))} ({_us(piece.roofline(gpu, 1))})"
            for gpu in found
        ]
        lines.append(f"| {piece.name} | {piece.limit} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Whole layer on 1 to 8 ranks, with the all-reduce of its output:",
        "",
        "| layer | ranks | " + " | ".join(gpu.name for gpu in found) + " |",
        "| --- | ---: |" + " ---: |" * len(found),
    ]
    works = [("prefill, T = 8192", pieces, TOKENS, f"prefill-T{TOKENS}-H32")]
    for n in BATCHES:
        name = f"decode-batch{n}-H32"
        if any((row["stage"], row["case"]) == ("layer", name) for row in rows):
            works.append((f"decode, batch {n}", decode_pieces(rows, measured, n), n, name))
    for name, parts, tokens, _ in works:
        for ranks in RANKS:
            cells = [_us(layer_seconds(parts, gpu, measured, ranks, tokens)) for gpu in found]
            lines.append(f"| {name} | {ranks} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, parts, tokens, case in works:
        model = _us(layer_seconds(parts, measured, measured, 1, tokens))
        seen = _us(best(rows, "layer", case)["us"] * 1e-6)
        lines.append(f"On the {MEASURED} itself, {name}: {model} by the model, {seen} measured.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perf.analysis.roofline", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="JSON files; default: all committed ones"
    )
    parser.add_argument("--notes", type=Path, help="write the tables between this file's markers")
    options = parser.parse_args(arguments)
    paths = options.runs or sorted((HISTORY / MEASURED.lower()).glob("*.json"))
    text = report(newest(read_run(path) for path in paths))
    print(text)
    if options.notes:
        write_between(options.notes, BEGIN, text, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
