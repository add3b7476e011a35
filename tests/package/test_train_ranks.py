"""`python -m kda_ops train` in several processes: the losses of one, whatever the mesh.

`tests/support/train_ranks.py` has what the processes run, all of it in the same four, once.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kda_ops.__main__ import main
from kda_ops.demos.training.command import _check_ranks
from kda_ops.demos.training.options import DEFAULTS, Refused, add_arguments
from kda_ops.demos.training.ranks import Ranks, device_of, ranks_of
from kda_ops.demos.training.trainer import Settings
from tests.support.processes import ROOT, free_ports, start
from tests.support.train_ranks import LAUNCHES, LOST, OPTIONS

STEPS = 9
ONE = {"tp": 1, "cp": 1, "dp": None, "fsdp": False}  # options of a run in one process


def in_one_process(*options: object) -> list[float]:
    """The losses of a run of the command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["train", *OPTIONS, "--eager", *map(str, options)]) == 0
    losses: list[float] = json.loads(out.getvalue())["losses"]
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes have run, with what they wrote."""
    path = tmp_path_factory.mktemp("ranks")
    for name in ("text", "other"):
        (path / name).write_text(f"{name} of the states of many heads, " * 20)
    in_one_process(f"--text={path / 'text'}", "--steps=2", f"--save={path / 'one'}")
    processes = start("tests.support.train_ranks", 4, path, *free_ports(len(LAUNCHES)))
    try:
        for process in processes:
            process.communicate(timeout=400)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[float]:
    """The losses of one process that ran through."""
    return in_one_process(f"--text={folder / 'text'}", f"--steps={STEPS}")


@pytest.fixture
def found(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What the ranks of a launch said."""

    def read(name: str) -> list[dict[str, Any]]:
        (run,) = (run for run in LAUNCHES if run.name == name)
        return [json.loads((folder / f"{name}-{p}.json").read_text()) for p in run.processes]

    return read


def assert_same(losses: list[float], whole: list[float], steps: int) -> None:
    """By the rule for shards: in fp64 to 1e-10."""
    assert len(losses) == steps
    expected = torch.tensor(whole[:steps], dtype=torch.float64)
    out = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "steps", "ranks", "said"),
    [
        ("dp", 4, (1, 1, 2, False), "2 data x 1 context x 1 tensor parallel"),
        ("tp", 4, (2, 1, 1, False), "1 data x 1 context x 2 tensor parallel"),
        ("compiled", 4, (2, 1, 1, False), "1 data x 1 context x 2 tensor parallel"),
        ("both", 6, (2, 1, 2, True), "2 data x 1 context x 2 tensor parallel, FSDP2"),
        ("replicas", 5, (1, 2, 2, False), "2 data x 2 context x 1 tensor parallel"),
        ("context", 7, (2, 2, 1, False), "1 data x 2 context x 2 tensor parallel"),
        ("compiled context", 4, (1, 2, 1, True), "1 data x 2 context x 1 tensor parallel, FSDP2"),
    ],
)
def test_losses(
    name: str,
    steps: int,
    ranks: tuple[int, int, int, bool],
    said: str,
    found: Callable[[str], list[dict[str, Any]]],
    whole: list[float],
) -> None:
    """Fresh and resumed, also from one process and from another mesh; the first rank speaks."""
    first, *others = found(name)
    assert first["code"] == 0, first["err"]
    printed = json.loads(first["out"])
    assert_same(printed["losses"], whole, steps)
    assert (printed["tp"], printed["cp"], printed["dp"], printed["fsdp"]) == ranks
    assert f"ranks   {said}\n" in first["err"]
    assert all(other == {"code": 0, "out": "", "err": ""} for other in others)


def test_resumed_in_one_process(folder: Path, whole: list[float], tmp_path: Path) -> None:
    """What four processes saved, over what two had saved; then as a file in its place."""
    path = folder / "tp"
    assert path.is_dir()
    assert not [*folder.glob("*.unfinished"), *folder.glob("*.old")]
    assert_same(in_one_process("--resume", path, "--steps=8", "--save", path), whole, 8)
    assert path.is_file()
    assert_same(in_one_process("--resume", path, "--steps=9"), whole, 9)


def test_ranks_that_mean_something_else(found: Callable[[str], list[dict[str, Any]]]) -> None:
    first, second = found("other text")
    assert first["code"] == second["code"] == 2
    assert "all processes must have the same text, got" in first["err"]
    assert "on rank 0 and" in first["err"]


def test_a_lost_rank_is_an_error(folder: Path) -> None:
    """Of the others, which do not wait for it."""
    first = json.loads((folder / f"{LOST}-0.json").read_text())
    assert first["code"] == 1
    assert "Connection" in first["err"]
    assert not (folder / f"{LOST}-1.json").exists()


def test_the_commands_of_the_page_fit() -> None:
    """Processes, options and the sizes that are their defaults, on a CPU and on GPUs."""
    page = (ROOT / "docs" / "several-gpus.md").read_text()
    lines = re.findall(
        r"^(?:torchrun --nproc-per-node (\d+)|python) -m kda_ops train ?(.*)$", page, re.M
    )
    assert len(lines) == 8
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for world, options in lines:
        args = parser.parse_args(shlex.split(options, comments=True))
        ranks = ranks_of(args, {"WORLD_SIZE": world, "RANK": "0"} if world else {})
        assert ranks.world == int(world or 1)
        for defaults in DEFAULTS.values():
            given = {name: getattr(args, name, value) for name, value in defaults.items()}
            _check_ranks(args, Settings(**given), ranks)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (
            {"tp": 2},
            None,
            "--tp 2 --cp 1 --dp 1 must run in 2 processes, as torchrun --nproc-per-node 2 "
            "-m kda_ops train starts them, got one without torchrun",
        ),
        ({"tp": 2, "dp": 2}, 2, "--tp 2 --cp 1 --dp 2 must run in 4 processes, .*, got 2"),
        ({"tp": 3}, 4, "--tp 3 --cp 1 --dp 1 must run in 3 processes, .*, got 4"),
        ({"tp": 2, "cp": 2}, 6, "--tp 2 --cp 2 --dp 1 must run in 4 processes, .*, got 6"),
        ({"fsdp": True}, None, "--fsdp must have --cp x --dp of at least 2, got --tp 1"),
        ({"tp": 2, "fsdp": True}, 2, "--fsdp must have .*, got --tp 2 --cp 1 --dp 1"),
    ],
)
def test_processes_that_do_not_fit(
    options: dict[str, Any], world: int | None, message: str
) -> None:
    args = argparse.Namespace(**ONE | options)
    with pytest.raises(Refused, match=f"^{message}"):
        ranks_of(args, {} if world is None else {"WORLD_SIZE": str(world), "RANK": "0"})


def test_ranks_of_torchrun() -> None:
    """Data parallel by default; neighbors are tensor parallel, then context parallel."""
    args = argparse.Namespace(**ONE | {"tp": 2})
    of_host = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    ranks = ranks_of(args, of_host)
    assert ranks == Ranks(2, 4, rank=5, local_rank=1, local_world=4)
    text = torch.arange(8 * 13).view(8, 13)
    assert ranks.share(text).equal(text[4:6])
    ranks = ranks_of(argparse.Namespace(**ONE | {"tp": 2, "cp": 2}), of_host)
    assert ranks == Ranks(2, 2, 2, rank=5, local_rank=1, local_world=4)
    # bytes of the second half of each sequence, the first of which the other part predicts
    assert dataclasses.replace(ranks, rank=6).share(text).equal(text[4:, 6:])
    assert ranks.share(text).equal(text[4:, :7])
    assert ranks_of(argparse.Namespace(**ONE), {"WORLD_SIZE": "1"}) == Ranks()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, "--heads must be a multiple of --tp 2, got 3"),
        ({"length": 81}, "--length must be a multiple of --tp 2, got 81"),
        ({"batch": 3}, "--batch must be a multiple of --dp 2, got 3"),
        ({}, "--baseline fla must run in one process, got 4"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    given = {"hidden": 48, "layers": 1, "heads": 2, "batch": 4, "length": 80} | sizes
    settings = Settings(**given, lr=1e-3, seed=0, dtype="fp32")
    with pytest.raises(Refused, match=f"^{message}$"):
        _check_ranks(argparse.Namespace(baseline="fla"), settings, Ranks(2, 2))


def test_lengths_that_do_not_fit() -> None:
    """Each part of a sequence is spread over the ranks that share its layers."""
    args, ranks = argparse.Namespace(baseline=None), Ranks(tp=2, cp=2)
    given = {"hidden": 48, "layers": 1, "heads": 2, "batch": 4, "lr": 1e-3, "seed": 0}
    _check_ranks(args, Settings(**given, length=84, dtype="fp32"), ranks)
    message = "^--length must be a multiple of --cp 2 x --tp 2, got 82$"
    with pytest.raises(Refused, match=message):
        _check_ranks(args, Settings(**given, length=82, dtype="fp32"), ranks)


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks, cuda = Ranks(2, 4, rank=5, local_rank=1, local_world=4), torch.device("cuda")
    assert device_of(cuda, ranks) == torch.device("cuda:1")
    assert device_of(torch.device("cuda:3"), Ranks()) == torch.device("cuda:3")
    with pytest.raises(Refused, match="--device must be cuda in several processes, got cuda:1"):
        device_of(torch.device("cuda:1"), ranks)
    with pytest.raises(Refused, match="8 processes of a machine must have a GPU each, it has 4"):
        device_of(cuda, Ranks(2, 4, local_world=8))


def test_the_command_refuses_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On all ranks, with one message per machine."""
    for local_rank, lines in ((0, 1), (1, 0)):
        environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": str(local_rank)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["train", *OPTIONS, "--tp=2", "--length=81"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == lines
