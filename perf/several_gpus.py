"""A layer trained on several GPUs of one host, beside one GPU and beside the prediction:

    torchrun --nproc-per-node N -m perf.several_gpus --json FILE

A step is a compiled forward and backward of a layer at hidden 2304 with 32 heads of 128, in bf16,
all gradients, those of the parameters as each rank has them. Ideal is the time of one GPU over the
number of GPUs; the prediction is that of `perf.analysis.mesh`, without overlap. A step takes as
long as its slowest rank. NVLink multicast is not used.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kda_ops.demos import arguments
from kda_ops.nn import ContextParallel, parallelize
from kda_ops.nn.layer import KimiDeltaAttention
from perf.analysis.mesh import Mesh, layer, nvlink
from perf.analysis.pages import table_row
from perf.analysis.report import newest
from perf.analysis.roofline import MEASURED, gpus, prefill_pieces
from perf.bench_layer import HEAD_DIM, HEADS, HIDDEN
from perf.harness.machine import HISTORY, gpu, software
from perf.harness.runs import read_run

LONG, SHORT, LONGEST = 2**17, 8192, 2**19  # tokens of a step
WARM_UP, REPEATS = 3, 10
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0"}


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one kind of mesh.

    Attributes:
        name: `"one GPU"`, `"cp N"` or `"tp N"`.
        tokens: Of a step, on all GPUs.
        seconds: The median of the steps of the slowest rank.
        of_ideal: One GPU's seconds over these and the GPUs; None if one GPU was not timed.
        predicted_seconds: By the model; None where it does not know the GPU.
        peak_bytes: Of the rank that takes the most; None on a CPU.
    """

    name: str
    tokens: int
    seconds: float
    of_ideal: float | None
    predicted_seconds: float | None
    peak_bytes: int | None


def largest(x: float, device: torch.device) -> float:
    """Of all ranks."""
    if not dist.is_initialized():
        return x
    found = torch.tensor(x, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def timed(step: Callable[[], Any], device: torch.device, repeats: int, alone: bool) -> float:
    """Seconds of a step that starts on all ranks at once; `alone` on this one."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not alone and dist.is_initialized():
            dist.barrier()

    found = []
    for _ in range(WARM_UP + repeats):
        wait()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        found.append(seconds if alone else largest(seconds, device))
    return statistics.median(found[WARM_UP:])


def training(module: nn.Module, x: Tensor, eager: bool) -> Callable[[], Any]:
    call: Any = module if eager else torch.compile(module, fullgraph=True)
    gradient = torch.randn_like(x)

    def step() -> None:
        module.zero_grad()
        x.grad = None
        call(x).backward(gradient)

    return step


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is timed: a layer of these sizes on the ranks of the machine."""

    device: torch.device
    hidden: int = HIDDEN
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    repeats: int = REPEATS
    eager: bool = False

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def make(self) -> KimiDeltaAttention:
        torch.manual_seed(0)
        sizes = (self.hidden, self.head_dim, self.heads)
        return KimiDeltaAttention(*sizes, device=self.device, dtype=self.dtype)

    def tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, count, self.hidden, generator=generator)
        return x.to(self.device, self.dtype)

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.ranks,))

    def measure(self, module: nn.Module, x: Tensor, alone: bool = False) -> tuple[float, int]:
        """Seconds of a step and the peak of memory."""
        torch._dynamo.reset()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        step = training(module, x.detach().requires_grad_(), self.eager)
        seconds = timed(step, self.device, self.repeats, alone)
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        return seconds, peak if alone else int(largest(peak, self.device))

    def alone(self, counts: Sequence[int]) -> list[tuple[float, int]]:
        """What `measure` finds on one GPU, for each count; ranks share these out, at once."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        found = [(0.0, 0)] * len(counts)
        for i in range(rank, len(counts), self.ranks):
            found[i] = self.measure(self.make(), self.tokens(counts[i]), alone=True)
        return [(largest(x, self.device), int(largest(y, self.device))) for x, y in found]

    def context_parallel(self, count: int) -> tuple[float, int]:
        context = ContextParallel(self.mesh())
        module = parallelize(self.make(), cp=context)
        return self.measure(module, context.shard(self.tokens(count)))

    def tensor_parallel(self, count: int) -> tuple[float, int]:
        return self.measure(parallelize(self.make(), self.mesh()), self.tokens(count))


def predicted(name: str, ranks: int, tokens: int) -> float | None:
    """Seconds by `perf.analysis.mesh`, for the GPU whose rows it has."""
    if not torch.cuda.is_available() or MEASURED not in torch.cuda.get_device_name():
        return None
    rows = newest(read_run(path) for path in sorted((HISTORY / MEASURED.lower()).glob("*.json")))
    measured = {gpu.name: gpu for gpu in gpus(rows)}[MEASURED]
    sizes = {"tp": 1, "cp": 1} | ({name: ranks} if ranks > 1 else {})
    mesh = Mesh(sizes["tp"], sizes["cp"], 1, nvlink(measured))
    return layer(mesh, measured, measured, prefill_pieces(rows), tokens).apart


def results(bench: Bench, long: int, short: int, longest: int) -> Iterator[Result]:
    """All rows, as they are measured: compiling takes most of the time."""
    ranks = bench.ranks

    def row(name: str, tokens: int, timing: tuple[float, int], one: float | None = None) -> Result:
        seconds, peak = timing
        of_ideal = None if one is None else one / seconds / ranks
        title = f"{name} {ranks}" if name in ("cp", "tp") else name
        expected = predicted(name, ranks if name in ("cp", "tp") else 1, tokens)
        return Result(title, tokens, seconds, of_ideal, expected, peak or None)

    alone = bench.alone((long, short))
    for tokens, one in zip((long, short), alone, strict=True):
        yield row("one GPU", tokens, one)
    yield row("cp", long, bench.context_parallel(long), alone[0][0])
    yield row("tp", short, bench.tensor_parallel(short), alone[1][0])
    if longest:
        yield row("cp", longest, bench.context_parallel(longest))


HEAD = "| | tokens | ms | of ideal | predicted, ms | peak, MB |\n" + "| --- " + "| ---: " * 5 + "|"


def line(x: Result) -> str:
    """Of a table in Markdown."""
    cells = (
        x.name,
        f"{x.tokens:,}",
        f"{x.seconds * 1e3:,.2f}",
        "" if x.of_ideal is None else f"{x.of_ideal:.2f}",
        "" if x.predicted_seconds is None else f"{x.predicted_seconds * 1e3:,.2f}",
        "" if x.peak_bytes is None else f"{x.peak_bytes * 1e-6:,.0f}",
    )
    return table_row(cells)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.several_gpus", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="write the rows")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of context parallelism")
    parser.add_argument("--short", type=int, default=SHORT, help="tokens of tensor parallelism")
    parser.add_argument("--longest", type=int, default=LONGEST, help="without one GPU; 0: none")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    for name, size in (("hidden", HIDDEN), ("heads", HEADS), ("head-dim", HEAD_DIM)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args(given)
    if "WORLD_SIZE" not in os.environ:
        parser.error("run it under torchrun: torchrun --nproc-per-node N -m perf.several_gpus")
    os.environ |= NO_MULTICAST
    device = options.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bench = Bench(
        device, options.hidden, options.heads, options.head_dim, options.repeats, options.eager
    )
    first = dist.get_rank() == 0
    machine = gpu() if device.type == "cuda" and first else {}
    facts = {"ranks": bench.ranks, "machine": machine, "software": software()}
    rows: list[Result] = []
    if first:
        print(HEAD, flush=True)
    for row in results(bench, options.long, options.short, options.longest):
        rows.append(row)
        if not first:
            continue
        print(line(row), flush=True)
        if options.json is not None:  # what there is, should a later one fail
            content = facts | {"rows": [dataclasses.asdict(x) for x in rows]}
            Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
