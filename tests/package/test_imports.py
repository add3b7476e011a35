"""Allowed imports, read from the sources; what `import kda_ops` loads, in fresh processes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kda_ops
from kda_ops._cases import operator_packages

ROOT = Path(kda_ops.__file__).parent.parent
TOP = ("kda_ops", "lowering", "tests", "perf")
HEAVY = (
    "triton", "torch._inductor", "torch._dynamo", "torch.distributed.tensor", "sympy",
    "numpy.testing", "nixl", "fla",
)  # fmt: skip
OPERATOR_FILES = {"__init__", "op", "reference", "kernel", "cases"}
MAY_HAVE = {"backward"}

# The packages of `kda_ops` from the bottom up. A package imports from packages below it, and from
# those on the same floor that are named here.
FLOORS = (
    {
        "_numerics",
        "_versions",
        "_roles",
        "_launch",
        "_progress",
        "_gradients",
        "_tracing",
        "_sharding",
        "config",
    },
    {"_checks", "kernel"},
    {"varlen", "_cases"},
    {"tuning"},
    {"_library"},
    {"_saving"},
    {"_registry"},
    {"native"},
    {"norm", "gating", "conv", "cache", "explain"},
    {"delta_rule", "transfer"},
    {"fused"},
    {"nn"},
    {"lowering"},
    {"integrations", "demos"},
    {"__main__"},
)
BESIDE = {
    ("conv", "norm"),  # the convolution of q, k and v ends with the norms of q and k
}
BASELINES = "kda_ops.demos.bench.providers"
SEAM = ("kda_ops._registry", "kda_ops.lowering")  # imported while something is traced


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("kda_ops", *parts) if parts[0] == "lowering" else parts)


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of the given folders: its name and syntax tree."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ROOT / "kda_ops" / "lowering" not in path.parents:  # the link
                yield module_name(path), ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module) -> set[str]:
    """Everything that a module imports, wherever in it: modules, and names imported from them.

    What is imported for annotations alone does not count.
    """
    found, annotations = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            annotations.update(child for x in node.body for child in ast.walk(x))
    for node in ast.walk(tree):
        if node in annotations:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found.add(name.value)
            elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                found.add(name.values[0].value.rstrip("."))
    return found


def within(name: str, package: str) -> bool:
    """`name` is `package` or something in it."""
    return name == package or name.startswith(package + ".")


def offenders(package: str, *folders: str) -> set[str]:
    """Modules of the folders that import a package."""
    return {
        module
        for module, tree in sources(*folders)
        if any(within(name, package) for name in imports(tree))
    }


def arrows() -> dict[str, set[str]]:
    """The modules of `kda_ops` and `lowering` that each of them imports, without the seam."""
    trees = dict(sources("kda_ops", "lowering"))
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        used = {name for name in imports(tree) if name in trees and name != module}
        # `from a import b` names the package a as well
        packages = {name for name in used if any(other.startswith(name + ".") for other in used)}
        found[module] = {
            name for name in used - packages if (module, name) != SEAM and name != "kda_ops"
        }
    return found


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_the_rules_cover_every_kind_of_import() -> None:
    tree = ast.parse(
        "import a.b\n"
        "from c import d\n"
        "def f():\n"
        "    from e.g import h\n"
        "    import importlib\n"
        "    importlib.import_module('i.j')\n"
        "    importlib.import_module(f'k.{f}')\n"
        "if TYPE_CHECKING:\n"
        "    import l\n"
    )
    assert imports(tree) == {
        "a.b", "c", "c.d", "e.g", "e.g.h", "importlib", "i.j", "k",
    }  # fmt: skip


def test_every_package_has_a_floor() -> None:
    rooms = {room(module) for module, _ in sources("kda_ops", "lowering")} - {""}
    assert rooms == set().union(*FLOORS)


def test_nothing_imports_upward() -> None:
    wrong = set()
    for module, used in arrows().items():
        if module == "kda_ops":
            continue
        for name in used:
            if room(name) == room(module) or (room(module), room(name)) in BESIDE:
                continue
            if floor(name) >= floor(module):
                wrong.add(f"{module} imports {name}")
    assert wrong == set()


def test_no_import_cycles() -> None:
    """Beside the one seam, through which `_registry` reaches `lowering`."""
    graph, done, circles = arrows(), set(), []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    assert circles == []


def test_only_kernels_import_triton() -> None:
    users = offenders("triton", "kda_ops")
    assert users, "no kernel found"
    files = (".kernel", ".backward")
    assert {x for x in users if not x.endswith(files) and ".kernels." not in x} == set()


def test_only_the_engine_imports_nixl() -> None:
    assert offenders("nixl", "kda_ops", "lowering") <= {"kda_ops.transfer.nixl"}


def test_only_its_integration_imports_vllm() -> None:
    assert offenders("vllm", *TOP) == {"kda_ops.integrations.vllm.plugin"}


def test_only_its_integration_imports_sglang() -> None:
    assert offenders("sglang", *TOP) == {"kda_ops.integrations.sglang"}


def test_only_its_integrations_import_transformers() -> None:
    users = {"kda_ops.integrations.transformers", "kda_ops.integrations.loading", BASELINES}
    assert offenders("transformers", "kda_ops", "lowering") == users


def test_safetensors_is_imported_in_one_place() -> None:
    assert offenders("safetensors", "kda_ops", "lowering") == {"kda_ops.nn.shards"}


def test_only_its_integration_imports_fla() -> None:
    users = {"kda_ops.integrations.fla.patching", "kda_ops.demos.training.baseline", BASELINES}
    assert offenders("fla", "kda_ops", "lowering") <= users


def test_only_lowering_imports_inductor() -> None:
    assert offenders("torch._inductor", "kda_ops", "perf") == set()


def test_kda_ops_imports_lowering_in_one_place() -> None:
    assert offenders("kda_ops.lowering", "kda_ops") == {SEAM[0]}


def test_lowering_has_one_import_name() -> None:
    assert offenders("lowering", *TOP) == set()


def test_nobody_imports_tests_or_perf() -> None:
    assert offenders("tests", "kda_ops", "lowering", "perf") == set()
    assert offenders("perf", "kda_ops", "lowering") == set()


def test_operators_do_not_import_one_another() -> None:
    """Operators of a family share its `formulas` and `kernel`, never one another's files."""
    wrong = set()
    packages = operator_packages().values()
    for module, used in arrows().items():
        own = next((package for package in packages if within(module, package)), None)
        for package in packages:
            if own is not None and package != own and any(within(x, package) for x in used):
                wrong.add(f"{module} imports {package}")
    assert wrong == set()


def test_lowering_takes_operators_by_their_modules() -> None:
    """A lowering uses an operator's `op` and `reference`, never the package's public names."""
    packages = operator_packages().values()
    wrong = {
        f"{module} imports {name}"
        for module, used in arrows().items()
        for name in used
        if within(module, "kda_ops.lowering") and name in packages
    }
    assert wrong == set()


def test_every_operator_has_the_same_files() -> None:
    for package in operator_packages().values():
        found = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")}
        assert found - MAY_HAVE == OPERATOR_FILES, package


def run(script: str, cache: Path) -> str:
    """The output of a fresh process; byte code is in `cache`, so that only the first compiles."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    """Beyond what `import torch` itself loads."""
    script = f"""
import sys
import torch
before = set(sys.modules)
import kda_ops, kda_ops.lowering
from kda_ops import KDABatch, KDAStateSpec, KimiDeltaAttention, prepare_chunk_indices
for name in sorted(set(sys.modules) - before):
    if any(name == heavy or name.startswith(heavy + ".") for heavy in {HEAVY}):
        print(name)
for name in ("triton", "torch._inductor", "torch._dynamo"):
    if name in sys.modules:
        print(name)
"""
    assert run(script, tmp_path) == ""


def test_a_call_on_the_cpu_loads_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import sys
import torch, kda_ops
before = set(sys.modules)
kda_ops.gate(torch.ones(2, 3, 4), torch.zeros(3))
for name in sorted(set(sys.modules) - before):
    if any(name == heavy or name.startswith(heavy + ".") for heavy in {HEAVY}):
        print(name)
"""
    assert run(script, tmp_path) == ""


def test_importing_takes_under_50_ms(tmp_path: Path) -> None:
    """Of a machine that parses argparse.py in 20: others are slower, or slow at times. The least of
    several runs, in CPU time: other load on the machine only adds to it.
    """
    script = """
import argparse, ast, inspect, time
import torch
source = inspect.getsource(argparse)

def took(call):
    start = time.process_time()
    call()
    return time.process_time() - start

unit = min(took(lambda: ast.parse(source)) for _ in range(5)) / 20
print(took(lambda: __import__("kda_ops")) / unit)
"""
    run(script, tmp_path)
    times = [float(run(script, tmp_path)) for _ in range(5)]
    assert min(times) < 50, times
