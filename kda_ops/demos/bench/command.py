"""The command: options, rows, table."""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kda_ops._checks import MAX_HEAD_DIM
from kda_ops._progress import Bar, progress
from kda_ops.demos import arguments
from kda_ops.demos.bench.picture import bars
from kda_ops.demos.bench.providers import LeftOut, Task, exact, providers
from kda_ops.demos.bench.timing import Timer, Times, measure
from kda_ops.nn.layer import KimiDeltaAttention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GATES = {"softplus": None, "bounded": -5.0}
KINDS = ("prefill", "decode", "train")
DEFAULTS: dict[str, dict[str, Any]] = {  # by device
    "cpu": {"tokens": 256, "hidden": 512, "heads": 4, "dtype": "fp32"},
    "cuda": {"tokens": 4096, "hidden": 2304, "heads": 32, "dtype": "bf16"},
}
WRONG = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3}  # relative errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops bench`."""

    def shape(name: str, text: str, **options: Any) -> None:
        cpu, cuda = (DEFAULTS[device][name] for device in ("cpu", "cuda"))
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f"{text} (default: {cpu}, {cuda} on a GPU)",
            **options,
        )

    parser.add_argument("kind", nargs="?", choices=KINDS, default="prefill", help="what is timed")
    parser.add_argument(
        "--device",
        type=arguments.device,
        default=arguments.default_device(),
        help="cpu or cuda",
    )
    parser.add_argument(
        "--batch", type=arguments.positive, default=1, metavar="N", help="sequences"
    )
    shape(
        "tokens", "tokens of a sequence, not of a decode step", type=arguments.positive, metavar="N"
    )
    shape("hidden", "width of input and output", type=arguments.positive, metavar="N")
    shape("heads", "query and key heads", type=arguments.positive, metavar="N")
    parser.add_argument(
        "--v-heads", type=arguments.positive, metavar="N", help="value heads; --heads by default"
    )
    parser.add_argument(
        "--head-dim", type=arguments.positive, default=128, metavar="N", help="K and V"
    )
    shape("dtype", "dtype of weights and inputs", choices=DTYPES)
    parser.add_argument("--gate", choices=GATES, default="softplus", help="forget gate")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compile", action="store_true", help="ours only compiled")
    only.add_argument("--eager", action="store_true", help="ours only eager")
    parser.add_argument(
        "--seconds", type=arguments.rate, default=2.0, help="how long each is sampled"
    )
    parser.add_argument(
        "--picture", type=_picture, metavar="FILE.svg", help="also draw the times as bars"
    )


def _picture(name: str) -> Path:
    path = arguments.new_file(name)
    if path.suffix != ".svg":
        raise argparse.ArgumentTypeError(f"must end in .svg, got {name}")
    return path


@dataclass(frozen=True)
class Row:
    """One line of the table; `error` is relative, of the first call's output."""

    name: str
    times: Times
    error: float


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Times, prints, draws; returns 1 if a result of ours is wrong."""
    for name, default in DEFAULTS[args.device.type].items():
        setattr(args, name, getattr(args, name, default))
    if args.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"--head-dim must be at most {MAX_HEAD_DIM}, got {args.head_dim}")
    if (args.v_heads or args.heads) % args.heads:
        raise ValueError(
            f"--v-heads must be a multiple of --heads, got {args.v_heads} and {args.heads}"
        )
    task = make_task(args)
    title = headline(args)
    print(f"{title}\n{arguments.device_name(args.device)}, torch {torch.__version__}", flush=True)
    rows, left_out = measured(task, args)
    tokens = args.batch * (1 if args.kind == "decode" else args.tokens)
    print(f"\n{table(rows, tokens)}")
    if left_out:
        print("\nleft out: " + "; ".join(f"{name}, {why}" for name, why in left_out.items()))
    wrong = [row for row in rows if not row.error < WRONG[task.x.dtype]]
    for row in wrong:
        print(f"FAILED: {row.name} has a relative error of {row.error:.1e}")
    wrong = [row for row in wrong if is_ours(row.name)]
    results |= {
        **{name: getattr(args, name) for name in ("kind", "batch", "hidden", "heads")},
        "tokens": None if args.kind == "decode" else args.tokens,
        "v_heads": args.v_heads or args.heads,
        **{name: getattr(args, name) for name in ("head_dim", "dtype", "gate")},
        "device": arguments.device_name(args.device),
        "torch": str(torch.__version__),
        "rows": [
            {
                "name": row.name,
                **{f"{name}_ms" if name != "samples" else name: x
                   for name, x in asdict(row.times).items()},
                "tokens_per_second": tokens / row.times.median * 1e3,
                "error": row.error,
            }
            for row in rows
        ],
        "left_out": left_out,
    }  # fmt: skip
    if args.picture is not None:
        lengths = [
            (row.name, row.times.median, milliseconds(row.times.median) + " ms", "kda" in row.name)
            for row in rows
        ]
        args.picture.write_text(bars(title, lengths), encoding="utf-8")
        print(f"wrote {args.picture}")
    return 1 if wrong else 0


def make_task(args: argparse.Namespace) -> Task:
    """A layer with random weights, and its input."""
    torch.manual_seed(0)
    bound = GATES[args.gate]
    with args.device:
        layer = KimiDeltaAttention(
            args.hidden,
            args.head_dim,
            args.heads,
            num_v_heads=args.v_heads,
            lower_bound=bound,
            safe_gate=bound is not None,
            dtype=DTYPES[args.dtype],
        )
        if layer.g_proj is not None:
            nn.init.zeros_(layer.g_proj.bias)  # FLA's layer has one, that of transformers has not
        shape = (1, args.batch) if args.kind == "decode" else (args.batch, args.tokens)
        x = torch.randn(*shape, args.hidden, dtype=DTYPES[args.dtype])
    return Task(args.kind, layer, x)


def measured(task: Task, args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The rows, the fastest first, and why others are left out."""
    with progress("computing the expected result"):
        expected = exact(task)
    timers: dict[str, Timer] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, make in providers(task, compiled=not args.eager, eager=not args.compile):
        try:
            call = make(task)
            with progress(f"first calls of {name}"):
                errors[name] = relative_error(call(), expected)
                timers[name] = Timer(call, task.device)
        except LeftOut as why:
            left_out[name] = str(why)
        except Exception as error:
            if is_ours(name):
                raise
            left_out[name] = f"it fails: {type(error).__name__}: {first_line(error)}"
    if not timers:
        return [], left_out
    with Bar(100, stream=sys.stdout) as bar:
        measure(
            list(timers.values()),
            args.seconds,
            lambda share: bar.update(int(100 * share), "% of the samples"),
        )
    rows = [Row(name, timer.times(), errors[name]) for name, timer in timers.items()]
    return sorted(rows, key=lambda row: row.times.median), left_out


def is_ours(name: str) -> bool:
    """Whether a fault of a provider is one of this package."""
    return name.startswith("kda_ops")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def headline(args: argparse.Namespace) -> str:
    values = args.v_heads or args.heads
    heads = f"{args.heads}" if values == args.heads else f"{args.heads}/{values}"
    heads += f" head{'s' * (values > 1)}"
    tokens = "" if args.kind == "decode" else f" x {args.tokens} tokens"
    return (
        f"{args.kind}  {args.batch} sequence{'s' * (args.batch > 1)}{tokens}, "
        f"hidden {args.hidden}, {heads} of {args.head_dim}, {args.gate} gate, {args.dtype}"
    )


def milliseconds(x: float) -> str:
    return f"{x:.3f}" if x < 10 else f"{x:.1f}"


def table(rows: list[Row], tokens: int) -> str:
    """Plain text; the last column says how many times as long as the fastest each takes."""
    lines = [["", "ms", "middle half", "tokens/s", "error", "time"]]
    for row in rows:
        t = row.times
        lines.append(
            [
                row.name,
                milliseconds(t.median),
                f"{milliseconds(t.low)} - {milliseconds(t.high)}",
                f"{tokens / t.median * 1e3:,.0f}",
                f"{row.error:.1e}",
                f"{t.median / rows[0].times.median:.2f}x",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        f"{line[0]:{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
