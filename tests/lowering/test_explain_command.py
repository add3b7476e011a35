"""`python -m kda_ops explain`: its report and page, its exit codes, its help."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.graph import GraphLowering

import kda_ops
from kda_ops.__main__ import main
from tests.lowering.test_explain import Page

ROOT = Path(kda_ops.__file__).parent.parent
FACTORIES = """
import torch
import kda_ops
from tests.lowering.test_launch_contract import KINDS, Stack

def good():
    return Stack(KINDS[:1]), [torch.randn(1, 8, 64, dtype=torch.bfloat16)]

def breaks():
    def f(x):
        torch._dynamo.graph_break()
        return x + 1
    return f, (torch.ones(2),), {}

def shapes():
    return torch.matmul, (torch.ones(2, 3), torch.ones(2, 3))

def nothing():
    return (lambda x: 3), (torch.ones(2),)

def number():
    return 3

def three():
    return 3, (), {}

def tensor():
    return torch.relu, torch.ones(2)

def strings():
    return torch.relu, (torch.ones(2),), "x"

def four():
    return 1, 2, 3, 4

def raises():
    raise RuntimeError("no weights here")

constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    name = f"factories_{abs(hash(tmp_path))}"  # imported once per process
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    return name


def test_the_command(factories: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kda_ops", "explain", f"{factories}:good"),
            *("--html", "page.html", "--json", "found.json"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "launches       8 -> 4" in done.stdout
    assert done.stdout.startswith("compiled for NVIDIA H200 (described, not present)")
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"compiling without and with the rewrites \.\.\. \d+\.\d s", lines[0])
    assert lines[1:] == ["wrote page.html"]
    page = Page((tmp_path / "page.html").read_text())
    assert "8 -> 4 launches" in page.text
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["command"], found["exit_status"], found["launches"]) == ("explain", 0, [8, 4])
    layer = found["layers"][0]
    assert "chunk_kda_gated" in [fired["rewrite"] for fired in layer["fired"]]
    assert len(layer["after"]["launches"]) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}", "argument module:factory: must be module:factory, got '{0}'"),
        ("{0}:", "must be module:factory, got '{0}:'"),
        ("a b:c", "must be module:factory, got 'a b:c'"),
        ("no_such_module.x:f", "there is no module 'no_such_module'"),
        ("{0}:nobody", "'{0}' has no 'nobody'"),
        ("{0}:constant", "{0}:constant must be callable, got int"),
        ("{0}:number", "must return (model, args) or (model, args, kwargs), got int"),
        ("{0}:four", "must return (model, args) or (model, args, kwargs), got 4 values"),
        ("{0}:three", "got a model that is int"),
        ("{0}:tensor", "got args that are Tensor, not a tuple"),
        ("{0}:strings", "got kwargs that are str, not a dict"),
        ("{0}:raises", "the factory raised RuntimeError: no weights here"),
    ],
)
def test_a_wrong_specification_exits_with_2(
    spec: str, message: str, factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["explain", spec.format(factories)]) == 2
    error = capsys.readouterr().err
    assert "python -m kda_ops explain: error: " in error
    assert message.format(factories) in error


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('raise ValueError("no weights here")', "ValueError: no weights here"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def factory(:", "SyntaxError: "),
    ],
)
def test_a_module_that_raises_says_why(
    source: str, reason: str, factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`argparse` alone would report a ValueError as an invalid value, without details."""
    name = f"{factories}_raises"
    Path(f"{name}.py").write_text(source)
    importlib.invalidate_caches()
    assert run_main(["explain", f"{name}:factory"]) == 2
    error = capsys.readouterr().err
    assert f"the module '{name}' raised {reason}" in error
    assert "Traceback" not in error
    sys.modules.pop(name, None)
    assert run_main(["explain", f"{name}:factory", "--debug"]) == 2
    assert f'{name}.py", line 1' in capsys.readouterr().err  # the traceback


def run_main(arguments: list[str]) -> int | str | None:
    """The exit code, returned or raised."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def test_other_faults(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["explain", f"{factories}:breaks"]) == 1
    assert "does not compile as one graph: Unsupported: Call to" in capsys.readouterr().err
    assert run_main(["explain", f"{factories}:nothing"]) == 1
    assert "one graph: ValueError: model must compute something" in capsys.readouterr().err
    assert run_main(["explain", f"{factories}:shapes"]) == 1
    error = capsys.readouterr().err
    assert "does not compile as one graph: " in error
    assert "same reduction dim" in error
    assert run_main(["explain", f"{factories}:good", "--html", "nowhere/page.html"]) == 2
    assert "cannot write nowhere/page.html" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run_main(["explain", f"{factories}:good", "--device", "cuda"]) == 2
        assert "no CUDA device is available" in capsys.readouterr().err


def test_a_model_without_code_is_reported_and_fails(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(GraphLowering, "codegen", side_effect=RuntimeError("no code here")):
        assert run_main(["explain", f"{factories}:good", "--html", "page.html"]) == 1
    text = capsys.readouterr().out
    assert "fired          chunk_kda_gated at chunk_kda" in text
    assert "launches       unknown -> unknown" in text
    assert text.endswith(
        "no code with or without the rewrites: InductorError: RuntimeError: no code here\n"
    )
    assert "no code here" in Page(Path("page.html").read_text()).text


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["explain", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("module:factory", "--html FILE", "--device", "--dynamic", "(model, args, kwargs)"):
        assert word in text
    assert "(default: described)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


@pytest.mark.gpu
def test_the_command_on_a_real_device(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Inductor may pad the two columns of beta's projection, one more kernel, if a timing says so.
    with inductor_config.patch(shape_padding=False):
        assert run_main(["explain", f"{factories}:good", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert torch.cuda.get_device_name() in out
    assert "launches       8 -> 4" in out
