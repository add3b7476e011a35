"""The command: its options, what it refuses, what it prints."""

import argparse
import dataclasses
import importlib.util
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kda_ops._checks import MAX_HEAD_DIM
from kda_ops._progress import Bar, progress
from kda_ops.demos import arguments
from kda_ops.demos.training.baseline import FlaMixer, fla_version
from kda_ops.demos.training.curve import SUFFIXES, draw, write_picture
from kda_ops.demos.training.text import Text, read_text
from kda_ops.demos.training.trainer import Settings, Trainer, load_checkpoint
from kda_ops.nn.layer import KimiDeltaAttention

OURS = "kda-ops"
STEPS, REPORT = 200, 10  # steps of a run, and between two readings of the loss
INTERRUPTED = 130  # as a shell has it
DTYPES = ("fp32", "bf16", "fp64")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"hidden": 64, "layers": 2, "heads": 2, "batch": 4, "length": 128, "lr": 3e-3},
    "cuda": {"hidden": 512, "layers": 6, "heads": 4, "batch": 16, "length": 1024, "lr": 1e-3},
}
DEFAULTS["cpu"] |= {"seed": 0, "dtype": "fp32"}
DEFAULTS["cuda"] |= {"seed": 0, "dtype": "bf16"}
SHAPE = ("hidden", "layers", "heads")  # what the weights of a checkpoint fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops train`."""
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]

    def setting(name: str, what: str, **options: Any) -> None:
        """An option whose default is the device's, or the checkpoint's."""
        default = f"{cpu[name]}" + (f", {cuda[name]} on a GPU" if cuda[name] != cpu[name] else "")
        options |= {"default": argparse.SUPPRESS, "help": f"{what} (default: {default})"}
        parser.add_argument(f"--{name}", **options)

    parser.add_argument(
        "--text",
        type=arguments.text_file,
        metavar="FILE",
        help="file to train on (default: the help topics of Python)",
    )
    parser.add_argument(
        "--device",
        type=arguments.device,
        default=arguments.default_device(),
        help="device of the model, cpu or cuda",
    )
    parser.add_argument(
        "--steps", type=arguments.positive, default=STEPS, help="steps of the whole run"
    )
    setting("batch", "sequences of a step", type=arguments.positive, metavar="N")
    setting("length", "bytes of a sequence", type=arguments.positive, metavar="N")
    setting(
        "hidden", "width of the model, a multiple of --heads", type=arguments.positive, metavar="N"
    )
    setting("layers", "number of blocks", type=arguments.positive, metavar="N")
    setting("heads", "heads of a block", type=arguments.positive, metavar="N")
    setting("lr", "learning rate after the warm-up", type=arguments.rate, metavar="RATE")
    setting("seed", "seed of weights and batches", type=arguments.seed, metavar="N")
    setting("dtype", "dtype; bf16 keeps the weights in fp32, fp64 needs the CPU", choices=DTYPES)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--baseline",
        choices=("fla",),
        help="then train with flash-linear-attention's layer, from the same weights (on a GPU)",
    )
    parser.add_argument(
        "--save", type=arguments.new_file, metavar="PATH", help="write a checkpoint at the end"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="continue a checkpoint, whose options are then the defaults, up to --steps in all",
    )
    parser.add_argument(
        "--picture",
        type=_picture,
        metavar="FILE",
        help=f"draw the curve to a file ({', '.join(SUFFIXES)}); needs matplotlib",
    )


def _picture(name: str) -> Path:
    path = arguments.new_file(name)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(SUFFIXES)}, got {name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install matplotlib")
    return path


@dataclass(frozen=True)
class Outcome:
    """How one training went.

    Attributes:
        losses: Of every step, in nats per byte, with those of a resumed run.
        tokens_per_second: Without the first step, in which everything compiles; None if that was
            the only one.
        peak_bytes: The most memory of the GPU; None on the CPU.
        fault: What ended it early, or None.
    """

    losses: list[float]
    tokens_per_second: float | None
    peak_bytes: int | None
    fault: str | None


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Trains and reports; returns the exit code."""
    try:
        saved = None if args.resume is None else _load(args.resume)
        settings, text = _settings(args, saved), _read(args, saved)
        _check(args, settings, text, saved)
    except Refused as refused:
        print(f"python -m kda_ops train: error: {refused}", file=sys.stderr)
        return 2
    outcomes: dict[str, Outcome] = {}
    with _interruptible() as interrupted:
        mixers: dict[str, Any] = {OURS: None}
        if args.baseline is not None:
            mixers[f"FLA {fla_version()}"] = FlaMixer
        for name, mixer in mixers.items():
            if interrupted():
                break
            if mixer is not None:
                print(f"\n{name}, from the same weights", flush=True)
            outcomes[name] = _train(args, settings, text, saved, mixer, interrupted)
            saved = None
        ended = interrupted()
    curves = {name: outcome.losses for name, outcome in outcomes.items()}
    if args.picture is not None:
        write_picture(curves, args.picture)
    results |= _as_json(args, settings, text, outcomes)
    print(f"\n{draw(curves)}\n\n{_table(outcomes)}")
    faults = [f"{name}: {outcome.fault}" for name, outcome in outcomes.items() if outcome.fault]
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else INTERRUPTED if ended else 0


# ---------------------------------------------------------------------- what is refused


class Refused(Exception):
    """A wrong option, as a message."""


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_checkpoint(path)
    except OSError as error:
        raise Refused(f"argument --resume: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"argument --resume: {error}") from error


def _settings(args: argparse.Namespace, saved: dict[str, Any] | None) -> Settings:
    """What was given, else what was saved, else the device's defaults."""
    values = dict(DEFAULTS[args.device.type] if saved is None else saved["settings"])
    for name in values:
        given = getattr(args, name, values[name])
        if saved is not None and name in SHAPE and given != values[name]:
            raise Refused(f"--{name} must be {values[name]}, as in {args.resume}, got {given}")
        values[name] = given
    return Settings(**values)


def _read(args: argparse.Namespace, saved: dict[str, Any] | None) -> Text:
    """The text that was given, else that of the checkpoint, else the default."""
    path = args.text
    if path is None and saved is not None and saved["text"]["path"] is not None:
        path = Path(saved["text"]["path"])
    try:
        text = read_text(path)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}; name a text with --text") from error
    except ImportError as error:
        raise Refused("this Python has no help topics: name a text with --text") from error
    if saved is not None and args.text is None and text.digest != saved["text"]["digest"]:
        raise Refused(f"{text.name} has changed since {args.resume}; name a text with --text")
    return text


def _check(
    args: argparse.Namespace, settings: Settings, text: Text, saved: dict[str, Any] | None
) -> None:
    """What the options are only together."""
    size, rest = divmod(settings.hidden, settings.heads)
    if rest:
        raise Refused(
            f"--hidden must be a multiple of --heads, got {settings.hidden} and {settings.heads}"
        )
    if size > MAX_HEAD_DIM:
        raise Refused(f"--hidden / --heads must be at most {MAX_HEAD_DIM}, got {size}")
    if len(text.content) <= settings.length:
        raise Refused(
            f"the text must have more than --length = {settings.length} bytes, "
            f"{text.name} has {len(text.content)}"
        )
    if settings.dtype == "fp64" and args.device.type != "cpu":
        raise Refused(f"--dtype fp64 needs --device cpu, got {args.device}")
    if saved is not None and args.steps <= len(saved["losses"]):
        done = len(saved["losses"])
        raise Refused(f"--steps must be more than the {done} of {args.resume}, got {args.steps}")
    if args.baseline is not None:
        _check_baseline(args.device, saved)


def _check_baseline(device: torch.device, saved: dict[str, Any] | None) -> None:
    if fla_version() is None:
        raise Refused("--baseline fla needs FLA: pip install flash-linear-attention")
    if device.type != "cuda":
        raise Refused(f"--baseline fla needs a GPU, got --device {device}")
    if saved is not None:
        raise Refused("--baseline fla must start with ours, not from --resume")


# ---------------------------------------------------------------------- what is run


def _train(
    args: argparse.Namespace,
    settings: Settings,
    text: Text,
    saved: dict[str, Any] | None,
    mixer: Callable[[KimiDeltaAttention], nn.Module] | None,
    interrupted: Callable[[], bool],
) -> Outcome:
    """One training from start to end; ours is saved."""
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    trainer = Trainer(settings, text, args.device, eager=args.eager, mixer=mixer)
    if saved is not None:
        trainer.restore(saved)
    if mixer is None:
        print(_headline(args, trainer), flush=True)
    speed, fault = None, None
    try:
        speed, fault = _steps(
            trainer, args.steps, interrupted, "first step" if args.eager else "compiling"
        )
    except torch.OutOfMemoryError:
        fault = "out of memory; lower --batch or --length"
    if args.save is not None and mixer is None and fault is None:
        trainer.save(args.save)
        print(f"saved {args.save} after {trainer.steps} steps", flush=True)
    peak = torch.cuda.max_memory_allocated(args.device) if on_gpu else None
    return Outcome(trainer.losses, speed, peak, fault)


def _steps(
    trainer: Trainer, steps: int, interrupted: Callable[[], bool], first: str
) -> tuple[float | None, str | None]:
    """Takes steps until there are `steps`; returns tokens per second, and what is wrong."""
    with progress(first):
        trainer.step()
        new = trainer.read()
    tokens = trainer.settings.batch * trainer.settings.length
    before, start, speed = trainer.steps, time.perf_counter(), None
    with Bar(steps, trainer.steps) as bar:
        while all(map(math.isfinite, new)) and trainer.steps < steps and not interrupted():
            for _ in range(min(REPORT - trainer.steps % REPORT, steps - trainer.steps)):
                trainer.step()
                if interrupted():
                    break
            new = trainer.read()
            speed = tokens * (trainer.steps - before) / (time.perf_counter() - start)
            left = (steps - trainer.steps) * tokens / speed
            bar.update(
                trainer.steps,
                f"loss {sum(new) / len(new):.3f}   {speed:,.0f} tokens/s   {left:.0f} s left",
            )
    if not all(map(math.isfinite, new)):
        return speed, f"the loss is not finite after {trainer.steps} steps; lower --lr"
    return speed, None


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed, so that a step is whole when a run ends; a second one
    interrupts at once.
    """
    pressed = threading.Event()

    def note(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------- what is printed


def _headline(args: argparse.Namespace, trainer: Trainer) -> str:
    s, text = trainer.settings, trainer.text
    count = sum(p.numel() for p in trainer.model.parameters())
    blocks = f"{s.layers} block{'s' * (s.layers > 1)}"
    lines = [
        f"model   {blocks} of hidden {s.hidden}, {s.heads} heads of {s.hidden // s.heads}, "
        f"{count:,} parameters, {s.dtype}",
        f"text    {text.name}, {len(text.content):,} bytes; {s.batch} x {s.length} a step",
        f"device  {arguments.device_name(args.device)}, torch {torch.__version__}, "
        f"{'eager' if args.eager else 'compiled'}",
    ]
    if trainer.steps:
        lines.append(f"resumed after {trainer.steps} steps of {args.resume}")
    return "\n".join(lines)


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan


def _table(outcomes: dict[str, Outcome]) -> str:
    """A row for each training."""
    columns = ["", f"first {REPORT}", f"last {REPORT}", "tokens/s"]
    rows = []
    for name, o in outcomes.items():
        speed = "-" if o.tokens_per_second is None else f"{o.tokens_per_second:,.0f}"
        means = (f"{_mean(losses):.3f}" for losses in (o.losses[:REPORT], o.losses[-REPORT:]))
        rows.append([name, *means, speed])
        if o.peak_bytes is not None:
            rows[-1].append(f"{o.peak_bytes / 2**20:,.0f}")
    if len(rows[0]) > len(columns):
        columns.append("peak MiB")
    width = max(len(row[0]) for row in rows) + 2
    return "\n".join(
        f"{row[0]:{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (columns, *rows)
    )


def _as_json(
    args: argparse.Namespace, settings: Settings, text: Text, outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    ours, *others = ({"name": name, **dataclasses.asdict(o)} for name, o in outcomes.items())
    return {
        **dataclasses.asdict(settings),
        "text": text.name,
        "bytes": len(text.content),
        "device": str(args.device),
        "torch": str(torch.__version__),
        "compiled": not args.eager,
        **{name: x for name, x in ours.items() if name != "name"},
        "baseline": others[0] if others else None,
        "saved": None if args.save is None or ours["fault"] else str(args.save),
    }
