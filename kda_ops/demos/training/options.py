"""The options of the command."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from kda_ops.demos import arguments
from kda_ops.demos.training.checkpoints import is_checkpoint
from kda_ops.demos.training.curve import SUFFIXES

STEPS = 200  # of a run
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
    _add_ranks(parser)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--baseline",
        choices=("fla",),
        help="then train with flash-linear-attention's layer, from the same weights (on a GPU)",
    )
    parser.add_argument(
        "--save",
        type=_checkpoint,
        metavar="PATH",
        help="write a checkpoint at the end: a file, or a folder that several processes share",
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


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Under torchrun --nproc-per-node N -m kda_ops train, with N = --tp x --cp x --dp.",
    )
    group.add_argument(
        "--tp",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="tensor parallel: processes that share each layer, by its heads",
    )
    group.add_argument(
        "--cp",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="context parallel: parts of each sequence, for long ones",
    )
    group.add_argument(
        "--dp",
        type=arguments.positive,
        metavar="N",
        help="data parallel: parts of a batch, by sequences (default: all processes that are left)",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="the processes of --dp and --cp also share weights, gradients and optimizer (FSDP2)",
    )


def _picture(name: str) -> Path:
    path = arguments.new_file(name)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(SUFFIXES)}, got {name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install matplotlib")
    return path


def _checkpoint(name: str) -> Path:
    """A file that can be written, or a checkpoint in a folder that can be replaced."""
    path = Path(name)
    return path if is_checkpoint(path) else arguments.new_file(name)


class Refused(Exception):
    """A wrong option, as a message."""
