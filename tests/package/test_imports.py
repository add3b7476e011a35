"""Who may import whom, read from the sources; what `import kda_ops` loads, in fresh processes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kda_ops
from tests.support.operators import NAMES

ROOT = Path(kda_ops.__file__).parent.parent
ROOMS = ("kda_ops", "lowering", "tests", "perf")
COMPOSERS = (
    "kda_ops.nn.layer",
    "kda_ops.integrations",
    "kda_ops.demos.compiled_layer",
    "kda_ops.__main__",
)
OPERATOR_MODULES = {"__init__", "op", "reference", "kernel", "cases"}
HEAVY = ("triton", "torch._inductor", "torch._dynamo", "sympy", "numpy.testing", "nixl", "fla")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of the given rooms: its name and syntax tree."""
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield module_name(path), ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module) -> set[str]:
    """Everything that a module imports, wherever in it: modules, and names imported from them."""
    found = set()
    for node in ast.walk(tree):
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


def offenders(package: str, *rooms: str) -> set[str]:
    """Modules of the rooms that import a package."""
    return {
        module
        for module, tree in sources(*rooms)
        if any(within(name, package) for name in imports(tree))
    }


def test_the_rules_see_every_kind_of_import() -> None:
    tree = ast.parse(
        "import a.b\n"
        "from c import d\n"
        "def f():\n"
        "    from e.g import h\n"
        "    import importlib\n"
        "    importlib.import_module('i.j')\n"
        "    importlib.import_module(f'k.{f}')\n"
    )
    assert imports(tree) == {
        "a.b", "c", "c.d", "e.g", "e.g.h", "importlib", "i.j", "k",
    }  # fmt: skip


def test_only_kernels_import_triton() -> None:
    users = offenders("triton", "kda_ops")
    assert users, "no kernel found"
    assert {name for name in users if not name.endswith(".kernel")} == set()


def test_only_the_engine_imports_nixl() -> None:
    assert offenders("nixl", *ROOMS[:2]) <= {"kda_ops.transfer.nixl"}


def test_nobody_imports_vllm() -> None:
    assert offenders("vllm", *ROOMS) == set()


def test_only_lowering_imports_inductor() -> None:
    assert offenders("torch._inductor", "kda_ops", "perf") == set()


def test_kda_ops_reaches_lowering_through_one_seam() -> None:
    assert offenders("lowering", "kda_ops") == {"kda_ops._registry"}


def test_nobody_imports_tests_or_perf() -> None:
    assert offenders("tests", "kda_ops", "lowering", "perf") == set()
    assert offenders("perf", "kda_ops", "lowering") == set()


def test_operators_do_not_import_one_another() -> None:
    """Only the layer, the integrations and the demo put operators together."""
    wrong = set()
    for module, tree in sources("kda_ops"):
        if module == "kda_ops" or any(within(module, composer) for composer in COMPOSERS):
            continue
        own = module.split(".")[1]
        for name in NAMES:
            if name != own and any(within(used, f"kda_ops.{name}") for used in imports(tree)):
                wrong.add(f"{module} imports {name}")
    assert wrong == set()


def test_operators_do_not_import_composers() -> None:
    wrong = {
        f"{module} imports {composer}"
        for module, tree in sources("kda_ops")
        if module.split(".")[-1] in OPERATOR_MODULES and module.split(".")[1:2] != ["integrations"]
        for composer in COMPOSERS
        if module != "kda_ops" and any(within(name, composer) for name in imports(tree))
        if not any(within(module, other) for other in COMPOSERS)
    }
    assert wrong == set()


def test_lowering_takes_operators_by_their_modules() -> None:
    """A lowering uses an operator's `op` and `reference`, never the package's public names."""
    wrong = set()
    for module, tree in sources("lowering"):
        for used in imports(tree):
            if within(used, "kda_ops") and used.count(".") == 1 and used.split(".")[1] in NAMES:
                wrong.add(f"{module} imports {used}")
            if any(within(used, composer) for composer in COMPOSERS):
                wrong.add(f"{module} imports {used}")
    assert wrong == set()


def test_every_operator_has_the_same_files() -> None:
    """Five, and a sixth where the gradient has kernels of its own."""
    for name in NAMES:
        found = {path.stem for path in (ROOT / "kda_ops" / name).glob("*.py")}
        assert found - {"backward"} == OPERATOR_MODULES, name
        assert (ROOT / "lowering" / f"{name}.py").exists(), name
        assert (ROOT / "perf" / f"bench_{name}.py").exists(), name


def run(script: str, cache: Path) -> str:
    """What a fresh process prints; byte code is kept in `cache` so that only the first compiles."""
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
import kda_ops, kda_ops.nn.layer, kda_ops.cache.spec, kda_ops.varlen, lowering
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
    """Processor time, the least of several: what else runs on the machine only adds to it."""
    script = """
import time
import torch
start = time.process_time()
import kda_ops
print(time.process_time() - start)
"""
    run(script, tmp_path)
    times = [float(run(script, tmp_path)) for _ in range(5)]
    assert min(times) < 0.05, times
