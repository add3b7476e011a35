"""Where in the model a node of a graph comes from: its modules and its line of source."""

import re
from pathlib import Path
from typing import Any

from torch import fx

import kda_ops

KEPT = ("nn_module_stack", "stack_trace")
PACKAGE = Path(kda_ops.__file__).parent
FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)\n(?:[ ]*(\S.*))?')


def inherit(node: fx.Node, source: fx.Node) -> None:
    """Lets a node that a pass makes come from where `source` comes from."""
    for key in KEPT:
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])


def modules_of(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """`(path, class)` of the modules that a node was traced in, from the outermost.

    A path is written as in `named_modules()`, the traced module itself is the empty string.
    """
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple((_path(path), _class(kind)) for path, kind in stack)


def _path(path: str) -> str:
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path.replace("._modules[", "["))
    path = re.sub(r"^[LG]\.\w+\.?", "", path)  # what Dynamo found the module in
    return re.sub(r"^__closure__\.\d+\.cell_contents\.?", "", path)


def _class(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def layer_of(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in, empty if unknown."""
    modules = modules_of(node)
    return modules[-1][0] if modules else ""


def source_of(node: fx.Node) -> str:
    """`file:line in function: code` of the innermost line of the model, empty if unknown.

    The lines of the operators' own public functions do not count.
    """
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, function, code in reversed(frames):
        path = Path(file)
        if path.name == "op.py" and PACKAGE in path.parents:
            continue
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        code = f"{code}...)" if code.endswith("(") else code
        return f"{path}:{line} in {function}: {code}".removesuffix(": ")
    return ""
