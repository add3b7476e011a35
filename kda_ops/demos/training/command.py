"""The command: its options, what it refuses, what it prints."""

import argparse
import contextlib
import dataclasses
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kda_ops._checks import MAX_HEAD_DIM
from kda_ops._progress import Bar, progress
from kda_ops._versions import version
from kda_ops.demos import arguments
from kda_ops.demos.training.baseline import FlaMixer, fla_version
from kda_ops.demos.training.checkpoints import load_checkpoint
from kda_ops.demos.training.curve import draw, write_picture
from kda_ops.demos.training.model import BYTES, mlp_width
from kda_ops.demos.training.options import DEFAULTS, SHAPE, Refused
from kda_ops.demos.training.ranks import Ranks, connected, device_of, ranks_of
from kda_ops.demos.training.text import Text, read_text
from kda_ops.demos.training.trainer import Settings, Trainer

OURS = "kda-ops"
REPORT = 10  # steps between two readings of the loss
INTERRUPTED = 130  # as a shell has it


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
    ranks = Ranks()
    try:
        ranks = ranks_of(args)
        args.device = device_of(args.device, ranks)
        saved = None if args.resume is None else _load(args.resume)
        settings, text = _settings(args, saved), _read(args, saved)
        _check(args, settings, text, saved)
        _check_ranks(args, settings, ranks)
        with connected(ranks, args.device):
            ranks.agree(
                {
                    "options": (
                        ranks.tp,
                        ranks.cp,
                        ranks.dp,
                        ranks.fsdp,
                        args.eager,
                        bool(args.save),
                    ),
                    "settings": dataclasses.asdict(settings),
                    "steps": (args.steps, saved is not None and len(saved["losses"])),
                    "text": text.digest,
                }
            )
            with contextlib.nullcontext() if ranks.first else silenced():
                status, found = _run(args, settings, text, saved, ranks)
        results |= found if ranks.first else {}
        return status
    except Refused as refused:
        if ranks.local_rank == 0:  # what is refused is so on all ranks of a machine
            print(f"python -m kda_ops train: error: {refused}", file=sys.stderr)
        return 2


def silenced() -> contextlib.redirect_stdout[io.StringIO]:
    """Keeps what all but the first rank print to themselves."""
    return contextlib.redirect_stdout(io.StringIO())


def _run(
    args: argparse.Namespace,
    settings: Settings,
    text: Text,
    saved: dict[str, Any] | None,
    ranks: Ranks,
) -> tuple[int, dict[str, Any]]:
    """The trainings, and what is said about them: the exit code and the results."""
    outcomes: dict[str, Outcome] = {}
    with _interruptible(ranks) as interrupted:
        mixers: dict[str, Any] = {OURS: None}
        if args.baseline is not None:
            mixers[f"FLA {fla_version()}"] = FlaMixer
        for name, mixer in mixers.items():
            if interrupted():
                break
            if mixer is not None:
                print(f"\n{name}, from the same weights", flush=True)
            trainer = Trainer(
                settings, text, args.device, eager=args.eager, ranks=ranks, mixer=mixer
            )
            outcomes[name] = _train(args, trainer, saved, interrupted)
            saved = None
        ended = interrupted()
    curves = {name: outcome.losses for name, outcome in outcomes.items()}
    if args.picture is not None and ranks.first:
        write_picture(curves, args.picture)
    print(f"\n{draw(curves)}\n\n{_table(outcomes)}")
    faults = [f"{name}: {outcome.fault}" for name, outcome in outcomes.items() if outcome.fault]
    for fault in faults:
        print(f"FAILED: {fault}")
    status = 1 if faults else INTERRUPTED if ended else 0
    return status, _as_json(args, settings, text, ranks, outcomes)


# ---------------------------------------------------------------------- what is refused


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


def _check_ranks(args: argparse.Namespace, settings: Settings, ranks: Ranks) -> None:
    """What the options are only on several processes."""
    if settings.batch % ranks.dp:
        raise Refused(f"--batch must be a multiple of --dp {ranks.dp}, got {settings.batch}")
    if ranks.cp > 1 and settings.length % (ranks.cp * ranks.tp):
        raise Refused(
            f"--length must be a multiple of --cp {ranks.cp} x --tp {ranks.tp}, "
            f"got {settings.length}"
        )
    width = mlp_width(settings.hidden)
    for name, size in (
        ("--heads", settings.heads),
        ("--length", settings.length),
        ("the width of the MLPs", width),
        ("the number of bytes", BYTES),
    ):
        if size % ranks.tp:
            raise Refused(f"{name} must be a multiple of --tp {ranks.tp}, got {size}")
    if args.baseline is not None and ranks.world > 1:
        raise Refused(f"--baseline {args.baseline} must run in one process, got {ranks.world}")


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
    trainer: Trainer,
    saved: dict[str, Any] | None,
    interrupted: Callable[[], bool],
) -> Outcome:
    """One training from start to end; ours is saved."""
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    if saved is not None:
        trainer.restore(saved)
    if trainer.ours:
        print(_headline(args, trainer), flush=True)
    speed, fault = None, None
    try:
        speed, fault = _steps(
            trainer, args.steps, interrupted, "first step" if args.eager else "compiling"
        )
    except torch.OutOfMemoryError:
        if (
            trainer.ranks.world > 1
        ):  # the others are in the middle of a step, and end as this one does
            raise
        fault = "out of memory; lower --batch or --length"
    if args.save is not None and trainer.ours and fault is None:
        trainer.save(args.save)
        print(f"saved {args.save} after {trainer.steps} steps", flush=True)
    peak = torch.cuda.max_memory_allocated(args.device) if on_gpu else 0
    peak = trainer.ranks.largest(peak)
    return Outcome(trainer.losses, speed, peak or None, fault)


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


@contextlib.contextmanager
def _interruptible(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed on any rank, so that a step is whole when a run ends; a
    second one interrupts at once, if there is one rank. The answer is a collective.
    """

    def interrupted() -> bool:
        return bool(ranks.largest(pressed.is_set()))

    pressed = threading.Event()

    def note(*_: object) -> None:
        pressed.set()
        if ranks.world == 1:  # torchrun passes the first one on, a second time
            signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------- what is printed


def _headline(args: argparse.Namespace, trainer: Trainer) -> str:
    s, text = trainer.settings, trainer.text
    blocks = f"{s.layers} block{'s' * (s.layers > 1)}"
    lines = [
        f"model   {blocks} of hidden {s.hidden}, {s.heads} heads of {s.hidden // s.heads}, "
        f"{trainer.size:,} parameters, {s.dtype}",
        f"text    {text.name}, {len(text.content):,} bytes; {s.batch} x {s.length} a step",
        f"device  {arguments.device_name(args.device)}, torch {torch.__version__}, "
        f"{'eager' if args.eager else 'compiled'}",
    ]
    if trainer.ranks.world > 1:
        lines.append(f"ranks   {trainer.ranks}")
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
    args: argparse.Namespace,
    settings: Settings,
    text: Text,
    ranks: Ranks,
    outcomes: dict[str, Outcome],
) -> dict[str, Any]:
    ours, *others = ({"name": name, **dataclasses.asdict(o)} for name, o in outcomes.items())
    return {
        **dataclasses.asdict(settings),
        "text": text.name,
        "bytes": len(text.content),
        "device": str(args.device),
        "device_name": arguments.device_name(args.device),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "compiled": not args.eager,
        "tp": ranks.tp,
        "cp": ranks.cp,
        "dp": ranks.dp,
        "fsdp": ranks.fsdp,
        **{name: x for name, x in ours.items() if name != "name"},
        "baseline": others[0] if others else None,
        "saved": None if args.save is None or ours["fault"] else str(args.save),
    }
