"""`python -m kda_ops demo`: its table, its verdict, its options."""

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import kda_ops
from kda_ops.__main__ import main
from kda_ops.demos import compiled_layer
from kda_ops.demos.compiled_layer import Accuracy, Phase

GOOD = Phase("prefill", 1, 0, Counter(a_kernel=2), 2.0, 1.0)


def rows(table: str) -> dict[str, list[str]]:
    """The table's cells by the name of their row."""
    found = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    return {cells[0]: cells[1:] for cells in found}


def test_the_demo_succeeds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("less than the prompt, so it is repeated\n")
    arguments = ["demo", "--device", "cpu", "--tokens", "70", "--heads", "2"]
    file = tmp_path / "found.json"
    assert main([*arguments, "--layout", "DS", "--text", str(text), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [(x["name"], x["graphs"]) for x in found["phases"]] == [("prefill", 1), ("decode", 1)]
    assert (found["command"], found["conv_layout"], found["faults"]) == ("demo", "DS", [])
    out, err = capfd.readouterr()
    assert err == ""
    assert out.endswith("all is well\n")
    assert "hidden 2304, 2 heads of 128" in out
    assert "short.txt, 70 bytes prefilled, 16 decoded one by one" in out
    assert re.search(r"^compiling prefill \.\.\. \d+\.\d s$", out, re.M)
    assert re.search(r"^compiling decode \.\.\. \d+\.\d s$", out, re.M)
    table = rows(out)
    assert table["graphs"] == ["1", "1"]
    assert table["graph breaks"] == ["0", "0"]
    assert table["conv state layout"] == ["DS", "DS"]
    for name in ("eager, ms a step", "compiled, ms a step"):
        assert all(float(cell) > 0 for cell in table[name])
    for beginning in ("kda_ops::", "cpp_fused_"):
        assert any(name.startswith(beginning) for name in table)
    matmuls = [
        int(a) + int(b) for a, b in zip(table["aten::mm"], table["aten::addmm"], strict=True)
    ]
    assert matmuls == [4, 4]
    for name in ("prefill output", "decode output", "recurrent state"):
        error, allowed = (float(cell) for cell in table[name])
        assert 0 < error <= allowed


def test_a_wrong_result_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer that continues from another sequence's pages, found by the comparison with fp64."""

    def measure(layer, x, tokens):  # type: ignore[no-untyped-def]
        state = layer.state_spec().allocate(compiled_layer.SLOTS)
        prompt = compiled_layer.KDABatch.prefill([tokens], [compiled_layer.SLOT])
        prefilled = layer(x[:, :tokens], state=state, batch=prompt)
        wrong = tuple(s.clone() for s in state)
        wrong[1][compiled_layer.SLOT] *= 1.1
        steps = x[:, tokens:].split(1, dim=1)
        token = compiled_layer.KDABatch.decode([compiled_layer.SLOT])
        decoded = torch.cat([layer(y, state=wrong, batch=token) for y in steps], dim=1)
        return [GOOD, GOOD], [prefilled, decoded], wrong

    monkeypatch.setattr(compiled_layer, "_measure", measure)
    assert main(["demo", "--device", "cpu", "--tokens", "33", "--heads", "1"]) == 1
    out = capsys.readouterr().out
    assert "all is well" not in out
    assert "FAILED: prefill output" not in out
    assert "FAILED: decode output must be within" in out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"graphs": 2}, "prefill must be one graph, got 2"),
        ({"graphs": 0}, "prefill must be one graph, got 0"),
        ({"breaks": 1}, "prefill must have no graph break, got 1"),
        ({"launches": Counter()}, "prefill must launch something, the profiler saw nothing"),
    ],
)
def test_faults(change: dict[str, object], fault: str) -> None:
    assert compiled_layer._faults([GOOD], []) == []
    bad = copy.copy(GOOD)
    for name, value in change.items():
        object.__setattr__(bad, name, value)
    assert compiled_layer._faults([GOOD, bad], []) == [fault]


def test_errors_above_the_rule_are_faults() -> None:
    assert compiled_layer._faults([], [Accuracy("o", 0.5, 0.5)]) == []
    for error in (0.6, float("nan"), float("inf")):
        (fault,) = compiled_layer._faults([], [Accuracy("o", error, 0.5)])
        assert fault.startswith("o must be within 5.00e-01 of fp64, got ")


def test_accuracy_uses_the_tolerance_rule() -> None:
    """Twice the reference's error and the rounding of the dtype at the result's scale."""
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    reference = torch.tensor([1.0, -3.75], dtype=torch.bfloat16)
    out = torch.tensor([1.5, -4.0], dtype=torch.bfloat16)
    accuracy = compiled_layer._accuracy("o", out, reference, exact)
    eps = torch.finfo(torch.bfloat16).eps
    assert (accuracy.error, accuracy.allowed) == (0.5, 2 * (0.25 + 4 * eps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "argument --tokens: must be a whole number from 1, got '0'"),
        (["--tokens", "-3"], "argument --tokens: must be a whole number from 1, got '-3'"),
        (["--heads", "x"], "argument --heads: must be a whole number from 1, got 'x'"),
        (["--layout", "XY"], "argument --layout: invalid choice: 'XY'"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["--device", "nonsense"], "argument --device: must be cpu or cuda, got 'nonsense'"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got 'meta'"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_empty_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(SystemExit):
        main(["demo", "--text", str(empty)])
    assert "must not be empty" in capsys.readouterr().err


def test_help_in_a_fresh_process() -> None:
    for arguments, expected in (
        (["--help"], ["demo", compiled_layer.SUMMARY[:40]]),
        (["demo", "--help"], ["--device", "--tokens", "--heads", "--layout", "--text", "fp64"]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kda_ops", *arguments],
            cwd=Path(kda_ops.__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for word in expected:
            assert word in done.stdout
