"""Checkpoints of Kimi Linear and its relatives, from disk into a model."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kda_ops._checks import check_at_least
from kda_ops._progress import Bar
from kda_ops.integrations.transformers import accelerate
from kda_ops.nn.checkpoints import mismatches
from kda_ops.nn.loading import fill, layers_of, plan
from kda_ops.nn.shards import Shards


def load_kimi_linear(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    prefixes: Mapping[str, str] | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
    progress: bool | None = None,
) -> nn.Module:
    """Loads a checkpoint of safetensors files, in place.

    * Into a model with `KimiDeltaAttention` layers: their weights, in any naming of
      `kda_ops.nn.checkpoints`, packed on the way. A layer may lie in several files. What else the
      model and the checkpoint have is left alone.
    * Into a model of transformers, accelerated or not: all weights, by transformers' own names and
      conversions. It takes the memory of the weights once more while it loads.
    * Without a model: transformers makes it from `config.json`, and it is accelerated.

    Everything is checked by names and shapes before a weight is written. Weights keep the dtype and
    device that they have in the model.

    Args:
        path: A safetensors file, an index of several, or a directory with either, or with any
            safetensors files.
        model: Where to load. A layer that `kda_ops.nn.parallelize` made parallel reads the rows and
            columns of its own heads; load before `fully_shard`.
        prefixes: By the path of a layer in the model, the prefix of its names in the checkpoint,
            such as `"model.layers.3.self_attn."`; KDA layers that the checkpoint has besides stay
            unread. None: the same path if the checkpoint has every one, else layer by layer in
            order, if there are as many.
        tp_rank: Which rank's heads to read, in `[0, tp_size)`.
        tp_size: Into how many ranks the checkpoint's heads are divided: the layers have
            `num_v_heads / tp_size` value heads and `num_heads / tp_size` key heads (one, if there
            are fewer than ranks). 1 for whole layers, for parallel ones and with transformers.
        progress: Whether to show a bar on standard error; None shows it on a terminal.

    Returns:
        The model.

    Raises:
        ValueError: Everything that is missing, unexpected or of the wrong shape, by the
            checkpoint's names; files that are missing or damaged; layers that cannot be matched;
            or a model with neither kind of layer.
        ImportError: safetensors, or for a model of its own transformers, is not installed.
    """
    path = Path(path)
    check_at_least("tp_size", tp_size, 1)
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank must be in [0, {tp_size}), got {tp_rank}")
    shown = sys.stderr.isatty() if progress is None else progress
    layers = {} if model is None else layers_of(model)
    if model is not None and layers:
        with Shards(path) as shards:
            pieces = plan(shards, layers, prefixes, tp_rank, tp_size)
            with Bar(len(pieces), stream=sys.stderr) as bar:
                fill(shards, layers.values(), pieces, bar.update if shown else _silent)
        return model
    if model is not None and not is_of_transformers(model):
        raise ValueError(
            f"model must have KimiDeltaAttention layers or be a model of transformers, got "
            f"{type(model).__name__}"
        )
    if tp_size != 1 or prefixes is not None:
        raise ValueError(
            "tp_size and prefixes are for KimiDeltaAttention layers: transformers has plans and "
            f"names of its own, got tp_size {tp_size} and prefixes {prefixes}"
        )
    if model is None:
        config, model_class = described(path)
        return accelerate(from_files(path, model_class, config, config.dtype, shown))
    for name, p in model.named_parameters():
        if p.is_meta or hasattr(p, "device_mesh"):
            found = "on the device meta" if p.is_meta else "as a DTensor"
            raise ValueError(
                f"model must have whole parameters with memory, got {name} {found}: "
                "from_pretrained makes and loads such a model"
            )
    fresh = from_files(path, type(model), model.config, model.dtype, shown)
    model.load_state_dict(fresh.state_dict())
    return model


def _silent(done: int, text: str) -> None:
    """No progress bar."""


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one that transformers loads; transformers is not imported for it."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(model).__mro__
    )


def described(path: Path) -> tuple[Any, Any]:
    """The config beside a checkpoint, and the class that it names."""
    import transformers

    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ValueError(f"path must be a file or a directory that is there, got {path}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be given where there is no config.json, got None and {path}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ValueError(f"config.json must name one class of transformers, got {names}")
    return config, getattr(transformers, names[0])


def from_files(path: Path, model_class: Any, config: Any, dtype: Any, shown: bool) -> Any:
    """A new model of transformers with the weights of a checkpoint, all of which fit.

    Through `from_pretrained` with tensors that are read as they are needed, since it takes files
    only in directories with names of its own.
    """
    with Shards(path) as shards, quiet(shown):
        try:
            model, info = model_class.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=shards.lazy(),
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:  # tensors that it would combine do not fit one another
            raise ValueError(unfit(shards, model_class, config, [str(error)])) from error
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
        problems += [
            f"{name} must have shape {list(expected)}, got {tuple(found)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        problems += info["error_msgs"]
        if problems:
            raise ValueError(unfit(shards, model_class, config, problems))
    return model


def unfit(shards: Shards, model_class: Any, config: Any, problems: list[str]) -> str:
    """What transformers has against a checkpoint, by the names in its files where that is possible:
    it speaks of its own, several of which may be combined into one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    own = model.state_dict()
    forms = [own, revert_weight_conversion(model, own)]
    found = [
        mismatches(shards.shapes, {name: [tuple(x.shape)] for name, x in form.items()})
        for form in forms
    ]
    least = min(found, key=len)
    return f"the checkpoint does not fit the model: {'; '.join(least or problems)}"


@contextmanager
def quiet(shown: bool) -> Iterator[None]:
    """Keeps the report of transformers on what does not fit to itself; a progress bar, or none."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
