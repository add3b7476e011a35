"""Autotuned choices, cached on disk: one JSON file per choice.

A file is keyed by everything that a timing depends on: the GPU, the shapes, the candidates, the
versions of torch and Triton and the sources of the kernels. Its contents are checked against that
key when it is read; a mismatch counts as a miss. Files are replaced atomically, so processes may
share the folder.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kda_ops._versions import version

logger = logging.getLogger("kda_ops.tuning")
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
KERNELS = ("kernel.py", "kernels/*.py", "backward.py")  # files with kernels


def folder() -> Path:
    """`kda_ops` in Inductor's cache folder if `TORCHINDUCTOR_CACHE_DIR` is set, else in the user's
    cache folder.
    """
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if inductor:
        return Path(inductor) / "kda_ops"
    user = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(user) if user else Path.home() / ".cache") / "kda_ops"
    except RuntimeError:  # a user without a home
        import getpass  # loads the terminal's module

        return Path(tempfile.gettempdir()) / f"kda_ops_{getpass.getuser()}"


@cache
def versions() -> dict[str, str]:
    """Versions of torch and Triton, and a hash of the kernels and the timing code."""
    triton = next(filter(None, map(version, TRITON_PACKAGES)), "none")
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    kernels = [x for name in KERNELS for x in root.rglob(name)]
    for path in sorted([*kernels, *root.glob("tuning/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return {"torch": torch.__version__, "triton": triton, "kernels": digest.hexdigest()}


def path_of(question: Mapping[str, Any]) -> Path:
    """The file that answers a question (JSON values)."""
    text = json.dumps({**question, **versions()}, sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def load(question: Mapping[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cached answer, one of `answers`; None on a miss."""
    path = path_of(question)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s is not readable, measuring again: %s", path, error)
        return None
    if (
        not isinstance(found, dict)
        or found.get("question") != {**question, **versions()}
        or found.get("answer") not in answers
    ):
        logger.info("%s holds something else, measuring again", path)
        return None
    return found["answer"]


def save(question: Mapping[str, Any], answer: Mapping[str, Any], times: Any) -> None:
    """Caches an answer. A folder that cannot be written is logged, not an error."""
    path = path_of(question)
    text = json.dumps(
        {"question": {**question, **versions()}, "answer": dict(answer), "microseconds": times},
        indent=1,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s cannot be written, the choice is not remembered: %s", path, error)
