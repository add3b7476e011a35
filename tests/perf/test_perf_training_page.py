"""What the page on training says: targets, errors and rows of runs, and a training beside FLA's."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kda_ops.__main__ import main as kda_ops
from kda_ops.demos.training import command
from perf.analysis import curve, picture, report, targets
from perf.harness import machine
from tests.perf.test_perf_report import make_result

FLA = "FLA 0.6.0"
PAGE = Path(machine.HISTORY).parent.parent / "docs" / "training.md"
FACTS = {"eager_us": 9.0, "kernel_us": 3.5, "peak_MB": 1234}


def trained_run(path: Path, **changes: Any) -> Path:
    """A prefill, a training and the errors of its gradients."""
    names = ("dq", "ddt_bias")
    rows = [
        *(make_result(provider, us) for provider, us in ((FLA, 5.0), ("kda_ops", 4.0))),
        *(
            make_result(provider, us, stage="core training", case="softplus-T8192-H32") | FACTS
            for provider, us in ((FLA, 5.0), ("kda_ops", 2.0))
        ),
        *(
            {"gradient_accuracy": "softplus", "provider": provider}
            | {f"error_{name}": error for name in names}
            for provider, error in ((FLA, 0.004), ("kda_ops, fused", 0.002), ("kda_ops", 0.008))
        ),
    ]
    run = {"benchmarks": [{"extra_info": row} for row in rows]}
    path.write_text(json.dumps(run | changes))
    return path


def pages(folder: Path) -> list[Path]:
    found = [folder / name for name in ("performance.md", "training.md")]
    for page in found:
        page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return found


def test_training_has_its_own_page(tmp_path: Path) -> None:
    performance, training = pages(tmp_path)
    run = trained_run(tmp_path / "run.json")
    drawn = []
    arguments = ["--page", str(performance), "--training", str(training)]
    arguments += [f"--picture={tmp_path / 'a.png'}", f"--training-picture={tmp_path / 'b.png'}"]
    with mock.patch.object(picture, "draw", lambda *of: drawn.append(of)):
        assert report.main([str(run), *arguments]) == 0
    forward, of_training = drawn
    assert forward[0].name == "a.png"
    assert {row["stage"] for row in forward[1]} == {"gate"}
    assert of_training[0].name == "b.png"
    assert {row["stage"] for row in of_training[1]} == {"core training"}
    assert picture.panels(of_training[1], of_training[2]) == []  # these rows have no kernels
    text = performance.read_text()
    assert "(a.png)" in text
    assert "training.md" in text
    assert "core training" not in text
    assert "| gate | small | kda_ops | 4 |" in text
    text = training.read_text()
    assert text.startswith(f"before\n\n{report.BEGIN}\n## Speed, memory and errors\n\nNVIDIA H200")
    assert "(b.png)" in text
    goal = "| core training softplus-T8192-H32, against FLA | baseline / ours | 3 | 3.5 | 2.5 |"
    assert f"{goal} **missed** |" in text
    assert "against FLA | peak memory, ours / baseline | 1 | 0.8 | 1 | met |" in text
    assert (
        "| gradient accuracy softplus, fused, against FLA | error, baseline / ours | 1 |  | 2 |"
        in text
    )
    assert "| gates and keys | provider | `q` | `dt_bias` |" in text
    assert "| softplus | kda_ops, fused | 2.0e-03 | 2.0e-03 |" in text
    row = "| core training | softplus-T8192-H32 | kda_ops | 2 | 9 | 3.5 | 2 | 1 | 1,234 | 2.50 |"
    assert row in text
    assert "| gate |" not in text
    assert "old" not in text
    assert text.endswith(f"</details>\n{report.END}\n\nafter\n")


def test_nothing_of_training_where_it_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    performance, training = pages(tmp_path)
    rows = [make_result(FLA, 5.0), make_result("kda_ops", 4.0)]
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in rows]}))
    assert report.main([str(run), "--page", str(performance), "--training", str(training)]) == 0
    assert training.read_text() == f"before\n\n{report.BEGIN}\n{report.END}\n\nafter\n"
    assert "training" not in performance.read_text()
    assert "training" not in capsys.readouterr().out
    assert targets.main([str(run)]) == 1
    assert "No rows of training: its targets are left out." in capsys.readouterr().out


def test_only_training(tmp_path: Path) -> None:
    """A run of its benchmarks alone has a page of training, and errors alone have none."""
    _, training = pages(tmp_path)
    run = trained_run(tmp_path / "run.json")
    content = json.loads(run.read_text())
    for kept, expected in ((slice(2, 4), True), (slice(4, 6), False)):
        run.write_text(json.dumps({"benchmarks": content["benchmarks"][kept]}))
        assert report.main([str(run), "--training", str(training)]) == (0 if expected else 1)
        if expected:
            assert "Relative errors" not in training.read_text()


def test_the_page_has_room() -> None:
    text = PAGE.read_text()
    for begin, end in ((report.BEGIN, report.END), (curve.BEGIN, curve.END)):
        assert text.count(begin) == text.count(end) == 1


# ---------------------------------------------------------------------- a training beside FLA's


def trained(path: Path, text: Path, *options: str) -> dict[str, Any]:
    """What a tiny run of the command writes."""
    sizes = ["--hidden=16", "--layers=1", "--heads=2", "--batch=2", "--length=32", "--device=cpu"]
    arguments = ["--eager", "--steps=25", f"--text={text}", f"--json={path}", *sizes, *options]
    assert kda_ops(["train", *arguments]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("to be or not to be, that is the question. " * 40)
    return path


def test_one_command_writes_what_the_page_needs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ours in the place of FLA's layer, which needs a GPU."""
    with (
        mock.patch.object(command, "_check_baseline"),
        mock.patch.object(command, "fla_version", return_value="0.6.0"),
        mock.patch.object(command, "FlaMixer", lambda layer: layer),
    ):
        run = trained(tmp_path / "run.json", text, "--baseline=fla")
    page = tmp_path / "training.md"
    page.write_text(f"before\n{curve.BEGIN}\nold\n{curve.END}\nafter\n")
    drawing = tmp_path / "assets" / "training.svg"
    drawn: dict[str, Any] = {}
    with mock.patch.object(curve, "write_picture", lambda curves, path: drawn.update(curves)):
        arguments = [str(tmp_path / "run.json"), "--page", str(page), "--picture", str(drawing)]
        capsys.readouterr()
        assert curve.main(arguments) == 0
    out = capsys.readouterr().out
    losses = run["losses"]
    assert drawn == {"kda-ops": losses, FLA: run["baseline"]["losses"]}
    assert len(losses) == 25
    first, last = sum(losses[:10]) / 10, sum(losses[15:]) / 10
    assert f"{run['device_name']}, torch {run['torch']}" in out
    assert "| loss, step 8 | loss, step 10 | loss, step 17 | loss, step 25 | tokens/s |" in out
    (ours,) = (line for line in out.splitlines() if line.startswith("| kda-ops |"))
    cells = [cell.strip() for cell in ours.split("|")[2:-1]]
    assert (cells[1], cells[3]) == (f"{first:.3f}", f"{last:.3f}")
    assert cells[4] == f"{run['tokens_per_second']:,.0f}"
    assert cells[5] == ""  # memory of a CPU is not known
    written = page.read_text()
    assert written.startswith(
        f"before\n{curve.BEGIN}\n## A run beside {FLA}\n\n1 block of hidden 16"
    )
    link = f"![Loss by step of kda-ops and {FLA}](assets/training.svg)"
    assert written.endswith(f"{link}\n{curve.END}\nafter\n")


def test_losses_at_the_ends_of_parts() -> None:
    assert curve.stops(300) == [10, 100, 200, 300]
    assert curve.stops(4) == [1, 3, 4]
    assert curve.loss_at([1.0, 3.0], 2) == 2.0
    assert curve.loss_at([float(i) for i in range(1, 31)], 30) == 25.5


def test_an_interrupted_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses beside one another are of the same step."""
    facts = {"tokens_per_second": 1e6, "peak_bytes": 5e8, "fault": None}
    shape = {"hidden": 64, "heads": 2, "layers": 1, "batch": 1, "length": 8, "dtype": "bf16"}
    about = {"device_name": "cuda, NVIDIA H200", "torch": "2.11.0", "triton": None, "text": "text"}
    theirs = {"name": FLA, "losses": [4.0] * 12, **facts}
    run = {**shape, **about, **facts, "losses": [3.0] * 30, "baseline": theirs}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    assert curve.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "| kda-ops | 3.000 | 3.000 | 3.000 | 3.000 | 1,000,000 | 500 |" in out
    assert f"| {FLA} | 4.000 | 4.000 | 4.000 | 4.000 | 1,000,000 | 500 |" in out
    assert "| loss, step 12 |" in out
    path.write_text(json.dumps(run | {"baseline": theirs | {"losses": []}}))
    assert curve.main([str(path)]) == 1
    assert "no losses in" in capsys.readouterr().err
