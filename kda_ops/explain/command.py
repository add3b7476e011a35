"""Explaining fusions: what the rewrites change, layer by layer.

Compiles the model as one graph, twice: without the rewrites and with them. Prints for each layer
which rewrites fired; which nearly fired, what rejected them, and at which line of source; kernel
launches and other calls (GEMMs); and the bytes of intermediates that no longer go through memory.
The model is not run, and no GPU is needed: code is generated for an H200, or with `--device cuda`
for the GPU in the machine.

`factory` is called without arguments and returns `(model, args)` or `(model, args, kwargs)`: a
module or a function and its arguments. With a file my_model.py in this directory,

    def factory():
        return torch.nn.Linear(8, 8), (torch.randn(4, 8),)

the command is `python -m kda_ops explain my_model:factory`.

Exits with 1 if the model does not compile as one graph or no code can be generated for it, with 2
if the specification is wrong.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from kda_ops._progress import progress
from kda_ops.explain import explain

SUMMARY = "say which rewrites fire in a model, which nearly do, and what they save"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops explain`."""
    parser.add_argument(
        "factory",
        type=_specification,
        metavar="module:factory",
        help="function that makes the model",
    )
    parser.add_argument(
        "--html", type=_file, metavar="FILE", help="also write a page with drawings of the graphs"
    )
    parser.add_argument(
        "--device",
        choices=("described", "cuda"),
        default="described",
        help="generate code for a virtual H200, or move the model to the GPU",
    )
    parser.add_argument("--dynamic", action="store_true", help="compile with symbolic sizes")
    parser.add_argument(
        "--grad", action="store_true", help="compile for training, not under torch.no_grad()"
    )


class Wrong(Exception):
    """What is wrong with a factory; its cause is the error of the user's code."""


def _specification(spec: str) -> str:
    module, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise argparse.ArgumentTypeError(f"must be module:factory, got {spec!r}")
    return spec


def _factory(spec: str) -> Callable[[], Any]:
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _raised(f"the module {module!r}", error) from error  # it imports a missing one
        raise Wrong(f"there is no module {error.name!r}") from None
    except Exception as error:
        raise _raised(f"the module {module!r}", error) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise Wrong(f"{module!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise Wrong(f"{spec} must be callable, got {type(found).__name__}")
    return found


def _raised(what: str, error: Exception) -> Wrong:
    return Wrong(f"{what} raised {type(error).__name__}: {error} (--debug shows where)")


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {name}")
    return path


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Explains the model and prints the report; returns the exit code."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return _fail(2, "no CUDA device is available")
    on_cuda = args.device == "cuda"
    try:
        made = _made(_factory(args.factory), on_cuda)
    except Wrong as wrong:
        if args.debug and wrong.__cause__ is not None:
            traceback.print_exception(wrong.__cause__)
        return _fail(2, str(wrong))
    fault = _fault(made)
    if fault is not None:
        return _fail(2, f"the factory must return (model, args) or (model, args, kwargs), {fault}")
    model, call, named = (*(_on_cuda(made) if on_cuda else made), {})[:3]
    try:
        grad = contextlib.nullcontext() if args.grad else torch.no_grad()
        with grad, progress("compiling without and with the rewrites", sys.stderr):
            explanation = explain(model, *call, dynamic=args.dynamic, **named)
    except Exception as error:  # the compiler's, or the model's own
        if args.debug:
            traceback.print_exception(error)
        reason = f"{type(error).__name__}: {error}"
        return _fail(1, f"the model does not compile as one graph: {reason}")
    results |= explanation.to_dict()
    print(explanation)
    if args.html is not None:
        args.html.write_text(explanation.to_html(), encoding="utf-8")
        print(f"wrote {args.html}", file=sys.stderr)
    return 1 if any(explanation.failures) else 0


def _made(factory: Callable[[], Any], on_cuda: bool) -> Any:
    """What the factory returns."""
    try:
        with torch.device("cuda") if on_cuda else contextlib.nullcontext():
            return factory()
    except Exception as error:
        raise _raised("the factory", error) from error


def _fail(code: int, message: str) -> int:
    print(f"python -m kda_ops explain: error: {message}", file=sys.stderr)
    return code


def _fault(made: Any) -> str | None:
    """What is wrong with what a factory returned."""
    if not isinstance(made, tuple):
        return f"got {type(made).__name__}"
    if len(made) not in (2, 3):
        return f"got {len(made)} values"
    if not callable(made[0]):
        return f"got a model that is {type(made[0]).__name__}"
    if not isinstance(made[1], (tuple, list)):
        return f"got args that are {type(made[1]).__name__}, not a tuple"
    if len(made) == 3 and not isinstance(made[2], dict):
        return f"got kwargs that are {type(made[2]).__name__}, not a dict"
    return None


def _on_cuda(tree: Any) -> Any:
    """Modules and tensors, also inside of containers and dataclasses, on the GPU."""

    def move(x: Any) -> Any:
        if isinstance(x, (torch.Tensor, torch.nn.Module)):
            return x.to("cuda")
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            fields = [field.name for field in dataclasses.fields(x) if field.init]
            return dataclasses.replace(x, **{name: _on_cuda(getattr(x, name)) for name in fields})
        return x

    return tree_map(move, tree)
