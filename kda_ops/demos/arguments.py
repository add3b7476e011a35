"""Arguments that several commands take, checked before anything starts."""

import argparse
import math
import os
from pathlib import Path

import torch


def device(name: str) -> torch.device:
    """A CPU or a CUDA device that is there."""
    try:
        found = torch.device(name)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"no such CUDA device is available, got {name!r}")
    return found


def default_device() -> str:
    """The first CUDA device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device) -> str:
    """A device as the commands print it."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"


def positive(value: str) -> int:
    """A whole number from 1."""
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {value!r}")
    return int(value)


def seed(value: str) -> int:
    """A whole number that a generator takes."""
    if not value.isdecimal() or int(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**63), got {value!r}")
    return int(value)


def rate(value: str) -> float:
    """A finite number above 0."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {value!r}")
    return found


def text_file(name: str) -> Path:
    """A file that can be read and is not empty."""
    path = Path(name)
    try:
        if not path.read_bytes():
            raise argparse.ArgumentTypeError(f"must not be empty, got {name}")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {name}: {error.strerror}") from error
    return path


def new_file(name: str) -> Path:
    """A file that can be written, replaced if it exists."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {name}")
    return path
