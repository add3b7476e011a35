"""Checkpoints of a run: a file of one process, or a folder that several have written.

A folder is one of `torch.distributed.checkpoint`, with what is not a tensor in `run.json`. Names
and values in it do not depend on the number of processes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kda_ops.nn.state_dicts import by_parts

FORMAT = "kda_ops train 2"
FACTS = "run.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # the state of AdamW, besides the number of steps


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint in a folder."""
    return (path / FACTS).is_file()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, with its tensors on the CPU; that of a folder has its path as `"folder"`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is something else.
    """
    try:
        if path.is_dir():
            saved = json.loads((path / FACTS).read_text()) | {"folder": path}
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        if path.is_dir():
            raise ValueError(f"{path} is no checkpoint of this command") from error
        raise
    except OSError:
        raise
    except Exception as error:  # whatever the reader makes of other files
        raise ValueError(f"{path} is no checkpoint of this command") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this command")
    return saved


def save_file(path: Path, saved: dict[str, Any]) -> None:
    """Writes a checkpoint of one process, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(saved, unfinished)
    replace(unfinished, path)


def save_folder(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor], first: bool) -> None:
    """Writes a checkpoint of several processes, whole or not at all. A collective.

    Args:
        path: A folder that all of them reach.
        facts: What is not a tensor.
        tensors: By name, each rank's share.
        first: Whether this is the rank that speaks for all.
    """
    from torch.distributed import barrier
    from torch.distributed import checkpoint as dcp

    unfinished = path.with_name(f"{path.name}.unfinished")
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    dcp.save(dict(tensors), checkpoint_id=unfinished)
    if first:
        (unfinished / FACTS).write_text(json.dumps(facts))
        replace(unfinished, path)
    barrier()


def replace(new: Path, path: Path) -> None:
    """Moves a file or a folder to where another one may be."""
    if not new.is_dir() and not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_name(f"{path.name}.old")  # a folder is not replaced in one step
    remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    remove(old)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_folder(folder: Path, tensors: dict[str, Tensor], distributed: bool) -> None:
    """Fills tensors from a folder, on any number of processes. A collective if distributed."""
    from torch.distributed import checkpoint as dcp

    with warnings.catch_warnings():
        # said although it is what `no_dist` asks for
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(tensors), checkpoint_id=folder, no_dist=not distributed)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run by the names of a checkpoint in a folder: views, to save or to fill.

    The moments are made where the optimizer has none yet.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    found = {"model": {name: p.detach() for name, p in weights.items()}}
    for key in MOMENTS:
        found[key] = {name: moments(optimizer, p)[key] for name, p in weights.items()}
    return _named(model, found)


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter."""
    state: dict[str, Tensor] = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(p.detach())
    return state


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Says how many steps an optimizer has done, which a folder has once."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def fill_from_file(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    saved: Mapping[str, Any],
) -> None:
    """Fills a model that is spread over several processes with what one has saved.

    Args:
        model: The model.
        optimizer: Its optimizer.
        names: Of the parameters of the model before it was spread.
        saved: What `load_checkpoint` returned.
    """
    from torch.distributed.tensor import distribute_tensor

    states = saved["optimizer"]["state"]
    whole = {"model": {name: saved["model"][name] for name in names}}
    for key in MOMENTS:
        whole[key] = {name: states[i][key] for i, name in enumerate(names)}
    values = _named(model, whole)
    for name, target in state_of(model, optimizer).items():
        share: Any = target
        value = values[name].to(share.dtype)
        share.copy_(
            distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None)
        )


def _named(model: nn.Module, kinds: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{kind}.{name}": x
        for kind, tensors in kinds.items()
        for name, x in by_parts(model, tensors).items()
    }
