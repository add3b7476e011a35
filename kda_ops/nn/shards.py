"""Tensors of a checkpoint in one or several safetensors files, read as they are asked for."""

import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHOLE = "model.safetensors"  # the names that transformers gives, and looks for in this order
INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of a checkpoint by name. A context manager: its files stay open meanwhile.

    Args:
        path: A safetensors file, an index of several (`*.safetensors.index.json`), or a directory:
            with `model.safetensors`, with `model.safetensors.index.json`, or else with any
            safetensors files, all of which are taken.

    Raises:
        ValueError: There is no such file; or files that an index names, or the tensors that it
            says are in them, are missing; or a tensor is in two files; or a file is damaged.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("checkpoints are read by safetensors: pip install it") from error
        files, indexed = _files(path)
        self._open = ExitStack()
        self._tensors: dict[str, Any] = {}
        where: dict[str, list[str]] = defaultdict(list)
        with ExitStack() as stack:  # closes the files if one of them is refused
            for file in files:
                try:
                    opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if indexed.get(name, file.name) == file.name:
                        where[name].append(file.name)
                        self._tensors[name] = opened.get_slice(name)
            problems = [
                f"missing {name} in {file}, where the index says it is"
                for name, file in indexed.items()
                if name not in where
            ]
            problems += [
                f"{name} is in {' and in '.join(files)}"
                for name, files in where.items()
                if len(files) > 1
            ]
            if problems:
                raise ValueError(f"{path} is not one checkpoint: {'; '.join(problems)}")
            self._open = stack.pop_all()
        self.shapes = {name: tuple(x.get_shape()) for name, x in self._tensors.items()}

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._open.close()

    def lazy(self) -> dict[str, Any]:
        """Every tensor as safetensors gives it before it is read."""
        return dict(self._tensors)

    def read(self, name: str, shape: tuple[int, ...], axis: int, start: int, stop: int) -> Tensor:
        """A range along an axis of a tensor, of which nothing else is read.

        Args:
            name: Its name.
            shape: The shape in which it is meant; the file's may have the same elements otherwise
                arranged.
            axis: Of `shape`.
            start: First row or column.
            stop: Behind the last one.
        """
        x = self._tensors[name]
        stored = self.shapes[name]
        if stored[axis : axis + 1] == shape[axis : axis + 1]:
            rows = slice(start, stop)
            found: Tensor = x[rows] if axis == 0 else x[:, rows]
            return found
        whole: Tensor = x[:]
        return torch.narrow(whole.reshape(shape), axis, start, stop - start)


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and by tensor the one that an index names."""
    if path.is_dir():
        if (path / WHOLE).is_file():
            return [path / WHOLE], {}
        if not (path / INDEX).is_file():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise ValueError(f"path must have safetensors files, got {path} without any")
            return files, {}
        path = path / INDEX
    if not path.is_file():
        raise ValueError(f"path must be a file or a directory that is there, got {path}")
    if path.suffix != ".json":
        return [path], {}
    try:
        indexed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be an index with a weight_map: {error!r}") from error
    files = [path.parent / name for name in sorted(set(indexed.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{path} names files that are missing: {', '.join(missing)}")
    return files, indexed
