"""Lowerings activate automatically, even late, and a changed one is never served stale code. Each
test runs in its own processes.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kda_ops
from kda_ops.lowering import cache_key

REPOSITORY = Path(kda_ops.__file__).parent.parent

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


LAYER = """
import torch._inductor.graph as graph
from torch._dynamo.utils import counters
from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention

generated = []
codegen = graph.GraphLowering.codegen
graph.GraphLowering.codegen = lambda self: generated.append(self) or codegen(self)

layer = KimiDeltaAttention(64, 32, 2).eval().requires_grad_(False)
torch.manual_seed(0)
for parameter in layer.parameters():
    parameter.uniform_(-0.3, 0.3)
state = layer.state_spec().allocate(4)
compiled = torch.compile(layer, fullgraph=True)
prompt, token = torch.randn(1, 100, 64), torch.randn(1, 2, 64)
outputs = [
    compiled(prompt),
    compiled(prompt, state=state, batch=KDABatch.prefill([70, 30], [1, 2])),
    compiled(token, state=state, batch=KDABatch.decode([1, 2])),
]
found = dict(counters["inductor"]) | dict(counters["aot_autograd"])
print(json.dumps({
    "generated": len(generated),
    "sums": [x.double().sum().item() for x in (*outputs, *state)],
    "graphs": counters["stats"]["unique_graphs"],
    "hits": found.get("autograd_cache_hit", 0),
    "misses": found.get("fxgraph_cache_miss", 0) + found.get("autograd_cache_miss", 0),
    "bypassed": found.get("fxgraph_cache_bypass", 0) + found.get("autograd_cache_bypass", 0),
}))
"""

PLAIN_GATE = """
def plain(x, A_log):
    return kda_ops.chunk_cumsum(-A_log.exp()[:, None] * torch.nn.functional.softplus(x))

x = torch.full((1, 1, 2, 4), 0.5)
print(json.dumps(torch.compile(plain, fullgraph=True)(x, torch.zeros(2))[0, 0, 0, 0].item()))
"""

SQUARE_STATE = """
from torch._dynamo.utils import counters
state = torch.arange(36.0).view(1, 6, 6)
part = torch.compile(lambda s: kda_ops.conv_split(s, [2, 4])[0] + 1, fullgraph=True)(state)
found = dict(counters["inductor"]) | dict(counters["aot_autograd"])
print(json.dumps([found.get("autograd_cache_hit", 0), list(part.shape), part.flatten().tolist()]))
"""


def run_process(
    script: str, *, path: Path = REPOSITORY, cache: Path, variables: dict[str, str] | None = None
) -> Any:
    """Runs a script in a fresh process and returns the JSON that its last line prints."""
    environment = dict(os.environ) | {
        "PYTHONPATH": str(path),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # an empty cache would have Inductor compile a program for each instruction set first
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
        **(variables or {}),
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
import kda_ops._registry as define
activate, define.activate_lowerings = define.activate_lowerings, lambda: None
before = run()
define.activate_lowerings = activate
print(json.dumps([before, run()]))
"""
    before, after = run_process(script, cache=tmp_path)
    assert before["externs"] == 1
    assert after["externs"] == 0
    assert before["value"] == after["value"] == after["expected"]


def test_activates_automatically_and_caches(tmp_path: Path) -> None:
    cold = run_process("print(json.dumps(run()))", cache=tmp_path)
    assert cold["externs"] == 0
    assert cold["value"] == cold["expected"]
    warm = run_process("print(json.dumps(run()))", cache=tmp_path)
    assert warm["hits"] >= 1
    assert warm["misses"] == 0
    assert warm["value"] == warm["expected"]


def changed_copy(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the packages with one line changed."""
    for package in ("kda_ops", "lowering"):
        shutil.copytree(REPOSITORY / package, folder / package, symlinks=True)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return folder


def test_changed_lowering_with_a_warm_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    original = run_process("print(json.dumps(run()))", cache=cache)
    changed = changed_copy(
        tmp_path / "changed",
        "lowering/inline.py",
        "inline_reference(operator.reference, *args)",
        "inline_reference(lambda *a: operator.reference(*a) * 4, *args)",
    )
    result = run_process("print(json.dumps(run()))", path=changed, cache=cache)
    assert result["value"] == 4 * original["value"]


def test_changed_rewrite_with_a_warm_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    original = run_process(PLAIN_GATE, cache=cache)
    assert original == pytest.approx(-math.log(1 + math.exp(0.5)), rel=1e-6)
    changed = changed_copy(
        tmp_path / "changed",
        "lowering/rewrites/fuse_plain_gate.py",
        'match.values["bound"])}',
        "-2.0)}",
    )
    result = run_process(PLAIN_GATE, path=changed, cache=cache)
    assert result == pytest.approx(-2 / (1 + math.exp(-0.5)), rel=1e-6)


def test_every_source_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites, templates, kernels, references, choices."""
    for file in (
        "lowering/rewrites/framework.py",
        "lowering/rewrites/fuse_kda_decode.py",
        "lowering/operators/gate_cumsum.py",
        "kda_ops/delta_rule/kda_decode/kernel.py",
        "kda_ops/delta_rule/chunked/kernels/scan.py",
        "kda_ops/gating/gate/reference.py",
        "kda_ops/tuning/configs.py",
    ):
        folder = tmp_path / file
        path = changed_copy(folder, file, "\n", "\n\n") / file
        with monkeypatch.context() as patch:
            before = cache_key.source_hash()
            patch.setattr(cache_key, "__file__", str(folder / "kda_ops/lowering/cache_key.py"))
            assert cache_key.source_hash() != before, file
            path.write_text((REPOSITORY / file).read_text())
            assert cache_key.source_hash() == before


def test_changed_configuration_with_a_warm_cache(tmp_path: Path) -> None:
    """The two layouts have equal shapes here: nothing else distinguishes the graphs."""
    found = [
        run_process(SQUARE_STATE, cache=tmp_path, variables={"KDA_OPS_CONV_LAYOUT": layout})
        for layout in ("SD", "DS", "SD")
    ]
    state = torch.arange(36.0).view(1, 6, 6) + 1
    sd, ds = state[:, :, :2], state[:, :2]
    for (_, shape, values), expected in zip(found, (sd, ds, sd), strict=True):
        assert shape == list(expected.shape)
        assert values == expected.flatten().tolist()
    assert [hits > 0 for hits, *_ in found] == [False, False, True]


def test_a_warm_second_process_compiles_nothing_of_the_layer(tmp_path: Path) -> None:
    cold = run_process(LAYER, cache=tmp_path)
    assert cold["graphs"] == cold["generated"] == 3
    assert cold["misses"] >= 3
    built = set(tmp_path.rglob("*.so"))
    assert built
    warm = run_process(LAYER, cache=tmp_path)
    assert warm["graphs"] == warm["hits"] == 3
    assert warm["misses"] == warm["bypassed"] == warm["generated"] == 0
    assert set(tmp_path.rglob("*.so")) == built
    assert warm["sums"] == cold["sums"]
