"""Predicts a layer and a training step on many GPUs: `python -m perf.analysis.mesh`.

A block is a layer at hidden 2304 with 32 heads of 128 and a gated MLP. Compute is what one H200
took, scaled by `perf.analysis.roofline`: the forward from committed rows, the backward from
`perf/notes/layer.md`, tokens linearly. Each dimension of the mesh adds its collectives:

* `tp`: all-reduces of `[tokens, hidden]` in bf16, of the output forward and of the gradient of the
  input backward, for the layer and for the MLP.
* `cp`: all-gathers per rank of `[HV, K + V, K]` in fp32 forward and `[HV, V, K]` backward, and of
  the W - 1 last rows of hidden states in bf16, and of their gradients. A rank carries K more
  columns of the state forward; two GEMMs, of `[T, K]` and states, add to its output what it reads
  of the state before it, and give the gradient of that state (`perf/notes/context.md`).
* `fsdp`: all-gathers of bf16 weights, forward and backward, and a reduce-scatter of fp32 gradients,
  over all ranks of `cp` and `fsdp`.

Ranks of `tp` are neighbors, then those of `cp`, then those of `fsdp`. A dimension that leaves a
host has the network's latency, and the bandwidth that its ranks on one host have together, but not
more than within a host. Nothing of this was measured on more than one GPU.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kda_ops.demos.training.model import mlp_width
from perf.analysis.pages import table_row, write_between
from perf.analysis.report import newest
from perf.analysis.roofline import (
    ALL_REDUCE_SECONDS,
    MEASURED,
    SHEETS,
    Gpu,
    Piece,
    Row,
    gpus,
    prefill_pieces,
)
from perf.bench_layer import HEAD_DIM, HEADS, HIDDEN, TOKENS, WEIGHTS, WIDTH
from perf.harness.machine import HISTORY
from perf.harness.runs import read_run

BEGIN, END = "<!-- mesh:begin -->", "<!-- mesh:end -->"
BLOCKS, STEP_TOKENS = 20, 2**20
CONV_ROWS = 3
MLP_WEIGHTS = 3 * HIDDEN * mlp_width(HIDDEN)
ADAMW_BYTES = 28  # a parameter: reads fp32 weight, gradient and both moments, writes all but one
BF16, FP32 = 2, 4
# A backward of the layer at T = 8192 on an H200, of `perf/notes/layer.md`: two of the three parts
# of the GEMMs.
BACKWARD = (
    Piece("projections", 0, 0, 2 / 3 * 2454e-6, "flops"),
    Piece("recurrence", 0, 0, 1995e-6, "work"),
    Piece("convolution", 0, 0, 221e-6, "bytes"),
    Piece("output norm", 0, 0, 140e-6, "bytes"),
)
# Scan at twice the columns, 214 us as of 64 heads at T = 4096, instead of 163.
KEY_COLUMNS_SECONDS = 51e-6
# In arrays of [T, HV, 128]: forward a GEMM reads one and writes one, which is added to o; backward
# one reads two.
READS = Piece(
    "reads", 7 * TOKENS * WIDTH * 2, 2 * 2 * TOKENS * HEADS * HEAD_DIM * HEAD_DIM, 0, "bytes"
)
TRAINED_SECONDS = 5438e-6  # forward and backward, measured


@dataclass(frozen=True)
class Link:
    """Bytes per second of a GPU in one direction, and the latency of a small collective."""

    bytes_per_second: float
    seconds: float


NETWORK = Link(50e9, 30e-6)  # 400 Gb/s a GPU, as in most hosts of 8; the latency is assumed


def nvlink(gpu: Gpu) -> Link:
    """The link within a host."""
    return Link(gpu.link_bytes_per_second, ALL_REDUCE_SECONDS)


@dataclass(frozen=True)
class Mesh:
    """Ranks by dimension, innermost first, and what connects them.

    Attributes:
        tp: Tensor-parallel ranks.
        cp: Context-parallel ranks.
        fsdp: Data-parallel ranks, which share the weights with those of `cp`.
        inside: The link within a host.
        outside: The link between hosts.
        host: GPUs of a host.
    """

    tp: int
    cp: int
    fsdp: int
    inside: Link
    outside: Link = NETWORK
    host: int = 8

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.fsdp

    @property
    def parts(self) -> int:
        """Into how many the tokens are divided, and the weights of a tensor-parallel rank."""
        return self.cp * self.fsdp

    def link(self, stride: int, ranks: int) -> Link:
        """What one of so many ranks has, that far from each other. All that are on one host use
        its links to other hosts at once.
        """
        if stride * ranks <= self.host:
            return self.inside
        together = max(1, self.host // stride) * self.outside.bytes_per_second
        return Link(min(self.inside.bytes_per_second, together), self.outside.seconds)

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "cp": self.cp, "fsdp": self.fsdp}
        return " x ".join(f"{name} {n}" for name, n in sizes.items() if n > 1) or "one"


@dataclass(frozen=True)
class Collective:
    """What one GPU sends, and how long it takes: nothing, among a single rank."""

    bytes_sent: float
    link: Link

    @property
    def seconds(self) -> float:
        if not self.bytes_sent:
            return 0.0
        return self.link.seconds + self.bytes_sent / self.link.bytes_per_second


def all_gather(ranks: int, part: float, link: Link) -> Collective:
    """Of parts of so many bytes; a reduce-scatter to such parts sends the same."""
    return Collective((ranks - 1) * part, link)


def all_reduce(ranks: int, size: float, link: Link) -> Collective:
    """Of so many bytes: a reduce-scatter and an all-gather."""
    return Collective(2 * (ranks - 1) / ranks * size, link)


def tensor_parallel(mesh: Mesh, tokens: float) -> list[Collective]:
    """Of a layer, or of an MLP: forward and backward."""
    return 2 * [all_reduce(mesh.tp, tokens * HIDDEN * BF16, mesh.link(1, mesh.tp))]


def context_parallel(mesh: Mesh) -> list[Collective]:
    """Of a layer: forward and backward, states and rows of the convolution."""
    link = mesh.link(mesh.tp, mesh.cp)
    state = HEADS / mesh.tp * HEAD_DIM * HEAD_DIM * FP32
    rows = all_gather(mesh.cp, CONV_ROWS * HIDDEN * BF16, link)
    return [all_gather(mesh.cp, 2 * state, link), rows, all_gather(mesh.cp, state, link), rows]


def shards(mesh: Mesh, weights: int) -> list[Collective]:
    """Of a module with so many weights: gathered twice, gradients scattered."""
    link = mesh.link(mesh.tp, mesh.parts)
    part = weights / mesh.tp / mesh.parts
    gathered = all_gather(mesh.parts, part * BF16, link)
    return [gathered, gathered, all_gather(mesh.parts, part * FP32, link)]


@dataclass(frozen=True)
class Prediction:
    """Of one GPU: seconds of compute, and the collectives by dimension."""

    compute: float
    tp: list[Collective]
    cp: list[Collective]
    fsdp: list[Collective]

    @property
    def collectives(self) -> list[Collective]:
        return [*self.tp, *self.cp, *self.fsdp]

    @property
    def apart(self) -> float:
        """Seconds if no collective overlaps with compute."""
        return self.compute + sum(x.seconds for x in self.collectives)

    @property
    def overlapped(self) -> float:
        """Seconds if all do."""
        return max(self.compute, sum(x.seconds for x in self.collectives))


def key_columns(scan: Piece) -> Piece:
    """What K more columns take of a scan; of few heads, in segments, as long as the others."""
    return replace(scan, name="scan of key columns", seconds=KEY_COLUMNS_SECONDS)


def layer(mesh: Mesh, gpu: Gpu, measured: Gpu, forward: Sequence[Piece], tokens: int) -> Prediction:
    """Forward and backward of a layer on the mesh's share of so many tokens.

    Args:
        mesh: The mesh.
        gpu: Its GPUs.
        measured: The GPU of the pieces.
        forward: Of `TOKENS` tokens on a single rank (`roofline.prefill_pieces`).
        tokens: Of all ranks.
    """
    pieces = [*forward, *BACKWARD]
    if mesh.cp > 1:
        pieces += [READS, *map(key_columns, (x for x in forward if x.limit == "chain"))]
    own = tokens / mesh.parts
    compute = sum(piece.predicted(gpu, measured, mesh.tp) for piece in pieces) * own / TOKENS
    return Prediction(
        compute, tensor_parallel(mesh, own), context_parallel(mesh), shards(mesh, WEIGHTS)
    )


def step(mesh: Mesh, gpu: Gpu, measured: Gpu, forward: Sequence[Piece], tokens: int) -> Prediction:
    """A training step of `BLOCKS` blocks, without embedding and head."""
    one, own = layer(mesh, gpu, measured, forward, tokens), tokens / mesh.parts
    mlp = 6 * own * MLP_WEIGHTS / mesh.tp / gpu.flops_per_second
    weights = (WEIGHTS + MLP_WEIGHTS) / mesh.tp / mesh.parts
    adamw = ADAMW_BYTES * weights / gpu.bytes_per_second
    return Prediction(
        BLOCKS * (one.compute + mlp + adamw),
        BLOCKS * [*one.tp, *tensor_parallel(mesh, own)],
        BLOCKS * one.cp,
        BLOCKS * [*one.fsdp, *shards(mesh, MLP_WEIGHTS)],
    )


SIZES = [
    *((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1)),
    *((8, 2, 1), (2, 8, 1), (1, 16, 1), (1, 1, 16)),
    *((8, 4, 1), (4, 8, 1), (1, 32, 1), (1, 1, 32)),
    *((8, 8, 1), (8, 1, 8), (2, 4, 8), (1, 8, 8), (1, 64, 1), (1, 1, 64)),
]


def _mb(found: Sequence[Collective]) -> str:
    total = sum(x.bytes_sent for x in found)
    return f"{total * 1e-6:,.0f}" if total else ""


def report(
    rows: Sequence[Row], name: str, meshes: Sequence[tuple[int, int, int]], tokens: int
) -> str:
    """The table in Markdown.

    Raises:
        ValueError: A row that the model needs is missing, or there is no such GPU.
    """
    found = {gpu.name: gpu for gpu in gpus(rows)}
    if name not in found:
        raise ValueError(f"gpu must be one of {', '.join(found)}, got {name}")
    gpu, measured, forward = found[name], found[MEASURED], prefill_pieces(rows)
    one = Mesh(1, 1, 1, nvlink(gpu))
    alone = step(one, gpu, measured, forward, tokens).apart
    lines = [
        f"Predictions by `python -m perf.analysis.mesh`, not measurements: {name}, {tokens:,} "
        f"tokens a step, {BLOCKS} blocks, hosts of {one.host} GPUs with "
        f"{gpu.link_bytes_per_second * 1e-9:.0f} GB/s a GPU, "
        f"{NETWORK.bytes_per_second * 1e-9:.0f} GB/s between them. Times are without any overlap "
        "of collectives and compute, in parentheses with all of it. MB are what a GPU sends in a "
        "step. Ideal is one GPU's time over the number of GPUs.",
        "",
        "| GPUs | mesh | layer, ms | step, s | tp, MB | cp, MB | fsdp, MB | of ideal |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tp, cp, fsdp in meshes:
        mesh = Mesh(tp, cp, fsdp, nvlink(gpu))
        of_layer = layer(mesh, gpu, measured, forward, tokens)
        of_step = step(mesh, gpu, measured, forward, tokens)
        cells = (
            str(mesh.gpus),
            str(mesh),
            f"{of_layer.apart * 1e3:,.1f} ({of_layer.overlapped * 1e3:,.1f})",
            f"{of_step.apart:.2f} ({of_step.overlapped:.2f})",
            *(_mb(x) for x in (of_step.tp, of_step.cp, of_step.fsdp)),
            f"{alone / mesh.gpus / of_step.apart:.2f}",
        )
        lines.append(table_row(cells))
    model = layer(one, measured, measured, forward, TOKENS).apart
    lines += [
        "",
        f"One GPU takes {alone:.1f} s by the model. On one {MEASURED}, a layer forward and "
        f"backward at {TOKENS:,} tokens: {model * 1e6:,.0f} us by the model, "
        f"{TRAINED_SECONDS * 1e6:,.0f} measured.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.analysis.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default=MEASURED, choices=[gpu.name for gpu in SHEETS])
    parser.add_argument("--tokens", type=int, default=STEP_TOKENS, help="of a step, on all GPUs")
    for name in ("tp", "cp", "fsdp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="ranks; default: a table")
    parser.add_argument("--page", type=Path, help="write the table between this file's markers")
    options = parser.parse_args(arguments)
    sizes = (options.tp, options.cp, options.fsdp)
    if min(*sizes, options.tokens) < 1:
        parser.error("ranks and tokens must be at least 1")
    if HEADS % options.tp:
        parser.error(f"--tp must divide {HEADS} heads, got {options.tp}")
    rows = newest(read_run(path) for path in sorted((HISTORY / MEASURED.lower()).glob("*.json")))
    text = report(rows, options.gpu, SIZES if math.prod(sizes) == 1 else [sizes], options.tokens)
    print(text)
    if options.page:
        write_between(options.page, BEGIN, text, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
