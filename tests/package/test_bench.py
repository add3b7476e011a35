"""`python -m kda_ops bench`, and what all commands have: `--json`, `--debug`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops.__main__ import main
from kda_ops.demos.bench import command, providers, timing
from kda_ops.demos.bench.providers import NAIVE, Call, LeftOut, Task
from kda_ops.demos.bench.timing import Timer

SMALL = ["--device=cpu", "--hidden=24", "--heads=2", "--head-dim=8", "--seconds=0.01"]
BARE = [*SMALL, "--tokens=70"]


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Other tests compile the layer. (On a GPU there is FLA, which compiles what it imports.)"""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch, "compile", lambda layer, fullgraph: layer)
    monkeypatch.setattr(providers, "transformers", left_out)


def left_out(task: Task) -> Any:
    raise LeftOut("by the test")


@pytest.mark.parametrize("kind", ["prefill", "decode", "train"])
@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_all_compute_the_same(kind: str, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [f"--gate={gate}", "--v-heads=4", "--batch=3"]
    assert main(["bench", kind, *BARE, *more, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"kda_ops, compiled", "kda_ops, eager", NAIVE}
    assert all(row["error"] < 1e-5 for row in rows.values())
    tokens = 3 if kind == "decode" else 210
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["median_ms"])
    assert (found["command"], found["exit_status"]) == ("bench", 0)
    assert (found["heads"], found["v_heads"], found["dtype"]) == (2, 4, "fp32")
    assert "2/4 heads of 8" in err
    assert all(name in err for name in rows)


def test_table_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, file = tmp_path / "x.svg", tmp_path / "x.json"
    assert main(["bench", *BARE, "--eager", f"--picture={picture}", f"--json={file}"]) == 0
    out = capsys.readouterr().out
    names = [row["name"] for row in json.loads(file.read_text())["rows"]]
    assert names == re.findall(r"^(\w.*?)  +[\d.]+ +[\d.]+ - [\d.]+ ", out, re.MULTILINE)
    assert sorted(names) == [NAIVE, "kda_ops, eager"]
    assert "1.00x" in out
    assert "by the test" in out
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert all(f">{name}</text>" in drawn for name in names)
    widths = [float(x) for x in re.findall(r'<rect x="\d+" y="\d+" width="([\d.]+)"', drawn)]
    assert widths == sorted(widths)
    assert widths[-1] == 420


def test_a_wrong_result_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(providers, "ours", lambda task: lambda: 1.1 * task.x)
    assert main(["bench", *BARE]) == 1
    out = capsys.readouterr().out
    assert "FAILED: kda_ops, eager has a relative error of" in out
    assert "FAILED: kda_ops, compiled" not in out


def test_who_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = command.KimiDeltaAttention(24, 8, 2)
    task = Task("train", layer, torch.zeros(1, 600, 24))
    monkeypatch.setattr(providers, "fla_version", lambda: None)
    with pytest.raises(LeftOut, match="not installed"):
        providers.fla(task)
    monkeypatch.setattr(providers, "fla_version", lambda: "0.6.0")
    with pytest.raises(LeftOut, match="need a GPU"):
        providers.fla(task)
    with pytest.raises(LeftOut, match="for 512 tokens at most"):
        providers.naive(task)


def test_training_computes_gradients() -> None:
    layer = command.KimiDeltaAttention(24, 8, 2)
    task = Task("train", layer, torch.randn(1, 5, 24))
    providers.ours(task)()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    torch.manual_seed(0)
    assert all(isinstance(g, Tensor) and g.any() for g in expected.values())


def test_samples_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for its time, the slow one at least thrice; a sample has calls for 5 ms."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            now[0] += seconds
            order.append(name)

        return run

    cpu = torch.device("cpu")
    timers = [Timer(call("a", 0.001), cpu), Timer(call("b", 1.0), cpu)]
    assert [timer.calls for timer in timers] == [5, 1]
    order.clear()
    shares: list[float] = []
    timing.measure(timers, 0.02, shares.append)
    assert "".join(order) == ("aaaaab" * 3) + "aaaaa"
    assert shares == pytest.approx([0.625, 0.75, 0.875, 1.0])
    assert timers[0].times() == timing.Times(*[pytest.approx(1.0)] * 3, 4)


# ---------------------------------------------------------------------- all commands


def test_faults_of_users_have_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["bench", *SMALL, "--v-heads=3"]
    assert main(wrong) == 2
    out, err = capsys.readouterr()
    message = "--v-heads must be a multiple of --heads, got 3 and 2"
    assert err == f"python -m kda_ops bench: error: ValueError: {message} (--debug shows where)\n"
    assert out == ""
    with pytest.raises(ValueError, match=message):
        main([*wrong, "--debug"])
    assert main([*wrong, "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_a_baseline_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(task: Task) -> Call:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(providers, "naive", fails)
    assert main(["bench", *SMALL]) == 0
    assert f"{providers.NAIVE}, it fails: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_fault_of_ours_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "make_task", lambda args: 1 / 0)
    assert main(["bench", *SMALL]) == 1
    assert "error: ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture=x.png"], "argument --picture: must end in .svg, got x.png"),
        (["--compile", "--eager"], "argument --eager: not allowed with argument --compile"),
        (["--json=nowhere/x.json"], "argument --json: cannot write nowhere/x.json"),
        (["sleep"], "argument kind: invalid choice: 'sleep'"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of PyTorch and of baselines
def test_every_baseline_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("prefill", "decode", "train"):
        code = main(["bench", kind, "--eager", "--tokens=128", "--seconds=0.1", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found = json.loads(out)
        names = {row["name"].split()[0] for row in found["rows"]}
        assert {"kda_ops,", "definitions", "PyTorch,", "FLA"} <= names, found["left_out"]
