"""Lowerings become active by themselves, also late, and a changed one is never served the code of
the old one. Each test runs in processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lowering

REPOSITORY = Path(lowering.__file__).parent.parent

COMPILE = """
import json, sys
import torch
import kda_ops

def f(x, A_log):
    return kda_ops.gate(x * 2, A_log) * 2

def run():
    torch._dynamo.reset()
    x, A_log = torch.full((3, 2, 4), 0.5), torch.zeros(2)
    out = torch.compile(f, fullgraph=True)(x, A_log)
    # what an application has not imported before its first compile is not imported before here
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache, run_and_get_code
    found = dict(counters["inductor"]) | dict(counters["aot_autograd"])
    counters.clear()
    torch._dynamo.reset()
    with fresh_cache():
        _, codes = run_and_get_code(torch.compile(f, fullgraph=True), x, A_log)
    return {
        "value": out[0, 0, 0].item(),
        "expected": f(x, A_log)[0, 0, 0].item(),
        "externs": sum(code.count("torch.ops.kda_ops.gate.default(") for code in codes),
        "hits": found.get("fxgraph_cache_hit", 0) + found.get("autograd_cache_hit", 0),
        "misses": found.get("fxgraph_cache_miss", 0) + found.get("autograd_cache_miss", 0),
    }
"""


def run_process(script: str, *, path: Path = REPOSITORY, cache: Path) -> Any:
    """Runs a script in a fresh process and returns the JSON that its last line prints."""
    environment = dict(os.environ) | {
        "PYTHONPATH": str(path),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE + script],
        env=environment, cwd=path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_late_install_replaces_the_fallback(tmp_path: Path) -> None:
    """A graph compiled before the lowerings were there leaves fallback residue behind in Inductor;

    installing removes it.
    """
    script = """
import kda_ops._define as define
activate, define.activate_lowerings = define.activate_lowerings, lambda: None
before = run()
define.activate_lowerings = activate
print(json.dumps([before, run()]))
"""
    before, after = run_process(script, cache=tmp_path)
    assert before["externs"] == 1
    assert after["externs"] == 0
    assert before["value"] == after["value"] == after["expected"]


def test_active_without_being_asked_and_cached(tmp_path: Path) -> None:
    cold = run_process("print(json.dumps(run()))", cache=tmp_path)
    assert cold["externs"] == 0
    assert cold["value"] == cold["expected"]
    warm = run_process("print(json.dumps(run()))", cache=tmp_path)
    assert warm["hits"] >= 1
    assert warm["misses"] == 0
    assert warm["value"] == warm["expected"]


def test_changed_lowering_with_a_warm_cache(tmp_path: Path) -> None:
    cache, changed = tmp_path / "cache", tmp_path / "changed"
    original = run_process("print(json.dumps(run()))", cache=cache)
    for package in ("kda_ops", "lowering"):
        shutil.copytree(REPOSITORY / package, changed / package)
    source = changed / "lowering" / "gate.py"
    text = source.read_text()
    inlined = "inline_reference(gate_reference, *args)"
    assert inlined in text
    source.write_text(
        text.replace(inlined, "inline_reference(lambda *a: gate_reference(*a) * 4, *args)")
    )
    result = run_process("print(json.dumps(run()))", path=changed, cache=cache)
    assert result["value"] == 4 * original["value"]
