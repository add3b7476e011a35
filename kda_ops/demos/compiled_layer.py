"""A compiled Kimi Linear layer: prefills a text, decodes from paged state, checked against fp64.

The bytes of a text file go through a random embedding and one layer of Kimi Linear's sizes (hidden
2304, head size 128, softplus gate, bf16). The prompt is prefilled in one call, the next 16 bytes
are decoded one by one from the prefilled pages. Everything is compared with the same layer in fp64,
run over all bytes at once without a state.

Exits with 1 if a graph breaks, if prefill or decode needs more than one graph, or if an error
exceeds twice the sum of the eager CPU layer's error and its dtype's rounding.
"""

import argparse
import contextlib
import copy
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kda_ops import config
from kda_ops._progress import progress
from kda_ops.cache.batch import KDABatch
from kda_ops.demos import arguments
from kda_ops.nn.layer import KimiDeltaAttention, State

SUMMARY = "compile a Kimi Linear layer, prefill a text and decode, checked against fp64"
HIDDEN, HEAD_DIM, DTYPE = 2304, 128, torch.bfloat16
STEPS, REPEATS = 16, 3
SLOT, SLOTS = 1, 4
TEXT = Path(__file__)  # a text that every installation has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops demo`."""
    parser.add_argument(
        "--device",
        type=arguments.device,
        default=arguments.default_device(),
        help="device of the layer, cpu or cuda",
    )
    parser.add_argument(
        "--tokens",
        type=arguments.positive,
        default=argparse.SUPPRESS,
        help="prompt length in bytes (default: 256 on the CPU, 2048 elsewhere)",
    )
    parser.add_argument("--heads", type=arguments.positive, default=32, help="number of heads")
    parser.add_argument(
        "--layout",
        choices=(*config.LAYOUTS, config.AUTO),
        default=config.conv_layout,
        help="layout of the convolution state, SD: (slots, L, D), DS: (slots, D, L), or the faster",
    )
    parser.add_argument(
        "--text",
        type=arguments.text_file,
        metavar="FILE",
        help="file with the prompt and its continuation (default: the source of this command)",
    )


@dataclass(frozen=True)
class Phase:
    """Measurements of prefill or decode; times in milliseconds, per step for decode."""

    name: str
    graphs: int
    breaks: int
    launches: Counter[str]
    eager: float
    compiled: float


@dataclass(frozen=True)
class Accuracy:
    """The largest error of one result against fp64, and the allowed tolerance."""

    name: str
    error: float
    allowed: float


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Runs the demo and prints its table; returns 0 on success, else 1."""
    tokens = getattr(args, "tokens", 256 if args.device.type == "cpu" else 2048)
    source = args.text or TEXT
    print(f"layer   hidden {HIDDEN}, {args.heads} heads of {HEAD_DIM}, softplus gate, bf16")
    print(f"text    {source.name}, {tokens} bytes prefilled, {STEPS} decoded one by one")
    print(f"device  {arguments.device_name(args.device)}, torch {torch.__version__}", flush=True)
    torch.manual_seed(0)
    with torch.no_grad():
        original = KimiDeltaAttention(
            HIDDEN, HEAD_DIM, args.heads, conv_layout=args.layout, dtype=DTYPE
        )
        text = source.read_bytes()
        text *= -(-(tokens + STEPS) // len(text))  # a short text is repeated
        ids = torch.tensor(list(text[: tokens + STEPS]))
        hidden = torch.nn.functional.embedding(ids, torch.randn(256, HIDDEN, dtype=DTYPE))[None]
        layer = copy.deepcopy(original).to(args.device)
        layout = layer.state_spec().layout
        original.conv_layout = layer.conv_layout = layout
        phases, outputs, state = _measure(layer, hidden.to(args.device), tokens)
        with progress("checking against fp64"):
            accuracies = _check(original, hidden, tokens, outputs, state)
    print(f"\n{_table(phases, accuracies, layout)}")
    wrong = _faults(phases, accuracies)
    results |= {
        "device": str(args.device),
        "phases": [vars(phase) for phase in phases],
        "accuracies": [vars(accuracy) for accuracy in accuracies],
        "conv_layout": layout,
        "faults": wrong,
    }
    print("\n".join(["", *(f"FAILED: {fault}" for fault in wrong)]) if wrong else "\nall is well")
    return 1 if wrong else 0


def prefill() -> tuple[KimiDeltaAttention, tuple[Tensor]]:
    """The layer and a prompt: `python -m kda_ops explain kda_ops.demos.compiled_layer:prefill`."""
    return KimiDeltaAttention(HIDDEN, HEAD_DIM, 32, dtype=DTYPE), (
        torch.randn(1, 1024, HIDDEN, dtype=DTYPE),
    )


def decode() -> tuple[KimiDeltaAttention, tuple[Tensor], dict[str, object]]:
    """The layer and one token: `python -m kda_ops explain kda_ops.demos.compiled_layer:decode`."""
    layer = KimiDeltaAttention(HIDDEN, HEAD_DIM, 32, dtype=DTYPE)
    how = {"state": layer.state_spec().allocate(SLOTS), "batch": KDABatch.decode([SLOT])}
    return layer, (torch.randn(1, 1, HIDDEN, dtype=DTYPE),), how


def _measure(
    layer: KimiDeltaAttention, x: Tensor, tokens: int
) -> tuple[list[Phase], list[Tensor], State]:
    """Prefills, then decodes, through one compiled layer and one set of pages."""
    device = x.device
    compiled = torch.compile(
        layer, fullgraph=True, options={"cpp.enable_kernel_profile": device.type == "cpu"}
    )
    state = layer.state_spec().allocate(SLOTS, device=device)
    prompt = KDABatch.prefill([tokens], [SLOT], device=device)
    prefill, prefilled = _measure_phase("prefill", layer, compiled, [x[:, :tokens]], prompt, state)
    token = KDABatch.decode([SLOT], device=device)
    decode, decoded = _measure_phase(
        "decode", layer, compiled, list(x[:, tokens:].split(1, dim=1)), token, state
    )
    return [prefill, decode], [prefilled, decoded], state


def _measure_phase(
    name: str,
    layer: KimiDeltaAttention,
    compiled: Callable[..., Tensor],
    steps: list[Tensor],
    batch: KDABatch,
    state: State,
) -> tuple[Phase, Tensor]:
    """Compiles and runs the steps on `state`, then measures on other pages."""
    device = steps[0].device

    def forward(call: Callable[..., Tensor], pages: State) -> Tensor:
        return torch.cat([call(x, state=pages, batch=batch) for x in steps], dim=1)

    before = _graphs_and_breaks()
    with progress(f"compiling {name}"):
        output = forward(compiled, state)
        _wait_for(device)
    graphs, breaks = (n - m for n, m in zip(_graphs_and_breaks(), before, strict=True))
    pages = layer.state_spec().allocate(SLOTS, device=device)
    with progress(f"measuring {name}"):
        launches = _launches(lambda: compiled(steps[0], state=pages, batch=batch), device)
        eager = _milliseconds(lambda: forward(layer, pages), device) / len(steps)
        fast = _milliseconds(lambda: forward(compiled, pages), device) / len(steps)
    return Phase(name, graphs, breaks, launches, eager, fast), output


def _graphs_and_breaks() -> tuple[int, int]:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median wall time."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        _wait_for(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _launches(call: Callable[[], object], device: torch.device) -> Counter[str]:
    """What one call of a compiled function launches, by name, according to the profiler.

    On a GPU all kernels; on the CPU the generated loops, operators and GEMMs that the graph calls.
    """
    from torch.autograd import DeviceType
    from torch.autograd.profiler import profile

    on_gpu = device.type == "cuda"
    with _quiet_stderr():
        with profile(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as profiler:
            call()
            _wait_for(device)
        events = profiler.function_events or []
    if on_gpu:
        names = [e.name for e in events if e.device_type == DeviceType.CUDA]
    else:
        names = [
            e.name
            for e in events
            if e.cpu_parent is not None and "CompiledFxGraph" in e.cpu_parent.name
        ]
    return Counter(re.sub(r"^graph_\d+_|_\d+$", "", name) for name in names)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library logs its start and stop directly to the file descriptor."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(
    layer: KimiDeltaAttention, hidden: Tensor, tokens: int, outputs: list[Tensor], state: State
) -> list[Accuracy]:
    """Compares outputs and final state with the layer in fp64, on the CPU and without pages."""
    reference, (_, reference_state) = layer(hidden, output_state=True)
    exact, (_, exact_state) = copy.deepcopy(layer).double()(hidden.double(), output_state=True)
    parts = {"prefill": slice(0, tokens), "decode": slice(tokens, None)}
    results = [
        (f"{name} output", out, reference[:, rows], exact[:, rows])
        for out, (name, rows) in zip(outputs, parts.items(), strict=True)
    ]
    results.append(("recurrent state", state[1][SLOT], reference_state[1], exact_state[1]))
    return [_accuracy(*result) for result in results]


def _accuracy(name: str, out: Tensor, reference: Tensor, exact: Tensor) -> Accuracy:
    error, reference_error = (
        (x.cpu().double() - exact).abs().max().item() for x in (out, reference)
    )
    rounding = torch.finfo(DTYPE).eps * exact.abs().max().item()
    return Accuracy(name, error, 2 * (reference_error + rounding))


def _faults(phases: list[Phase], accuracies: list[Accuracy]) -> list[str]:
    wrong = []
    for phase in phases:
        if phase.graphs != 1:
            wrong.append(f"{phase.name} must be one graph, got {phase.graphs}")
        if phase.breaks:
            wrong.append(f"{phase.name} must have no graph break, got {phase.breaks}")
        if not phase.launches:
            wrong.append(f"{phase.name} must launch something, the profiler saw nothing")
    for a in accuracies:
        if not a.error <= a.allowed:  # also true for NaN
            wrong.append(f"{a.name} must be within {a.allowed:.2e} of fp64, got {a.error:.2e}")
    return wrong


def _table(phases: list[Phase], accuracies: list[Accuracy], layout: str) -> str:
    """Plain text, one column per phase."""
    rows = [
        ("", *(phase.name for phase in phases)),
        ("graphs", *(str(phase.graphs) for phase in phases)),
        ("graph breaks", *(str(phase.breaks) for phase in phases)),
        ("eager, ms a step", *(f"{phase.eager:.2f}" for phase in phases)),
        ("compiled, ms a step", *(f"{phase.compiled:.2f}" for phase in phases)),
        ("conv state layout", *(layout for _ in phases)),
        ("different kernels", *(str(len(phase.launches)) for phase in phases)),
        ("launches a step", *(str(phase.launches.total()) for phase in phases)),
    ]
    names = dict.fromkeys(name for phase in phases for name in phase.launches)
    rows += [
        (f"  {_shorten(name)}", *(str(phase.launches[name] or "") for phase in phases))
        for name in names
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    lines += ["", f"{'max error against fp64':{width}}{'error':>12}{'allowed':>12}"]
    lines += [f"  {a.name:{width - 2}}{a.error:12.2e}{a.allowed:12.2e}" for a in accuracies]
    return "\n".join(line.rstrip() for line in lines)


def _shorten(name: str, most: int = 60) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
