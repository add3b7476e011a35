"""`python -m kda_ops train`: its losses, its checkpoints, what it prints and refuses."""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.__main__ import main
from kda_ops._progress import Bar
from kda_ops._versions import version
from kda_ops.demos.training import command, curve
from kda_ops.demos.training.baseline import FlaMixer, fla_layer
from kda_ops.demos.training.text import read_text
from kda_ops.demos.training.trainer import Settings, Trainer
from tests.lowering.styles import fla
from tests.support.oracle import assert_close

ROOT = Path(kda_ops.__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text()
(SHOWN,) = re.findall(r"^```text\n(model .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SIZES = {"hidden": 16, "layers": 2, "heads": 2, "batch": 2, "length": 80}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TINY += ["--device=cpu", "--lr=3e-3"]
STEPS = 30
SENTENCE = "a state is one matrix per head and the last inputs of a short convolution"
WORDS = re.findall(r"\w+", SENTENCE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in random order."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(in_random_order(2000))
    return path


def in_random_order(count: int) -> str:
    return " ".join(random.Random(0).choices(WORDS, k=count))


@pytest.fixture
def train(text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the command, eager, and returns the JSON it prints."""

    def call(*arguments: object, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        shown = [*TINY, "--eager", "--json", f"--text={text}", *map(str, arguments)]
        assert main(["train", *shown]) == status
        out = capsys.readouterr().out
        found: dict[str, Any] = json.loads(out)
        return found

    return call


def losses(text: Path, dtype: str, steps: int = STEPS, **options: Any) -> Tensor:
    """The losses of an eager training in a dtype."""
    settings = Settings(**SIZES, lr=3e-3, seed=0, dtype=dtype)
    trainer = Trainer(settings, read_text(text), torch.device("cpu"), eager=True, **options)
    for _ in range(steps):
        trainer.step()
    return torch.tensor(trainer.read(), dtype=torch.float64 if dtype == "fp64" else torch.float32)


@pytest.fixture(scope="module")
def oracle(text: Path) -> tuple[Tensor, Tensor]:
    """The losses by the definitions, in fp32 and in fp64."""
    with kda_ops.reference():
        return losses(text, "fp32"), losses(text, "fp64")


# ---------------------------------------------------------------------- losses


# torch's own, raised where Dynamo reads what the embedding made
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(
    text: Path,
    tmp_path: Path,
    oracle: tuple[Tensor, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The losses are those of the definitions in fp64, and a resumed run gives them bit for bit."""
    from torch._dynamo.utils import counters

    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    fresh = [*TINY, f"--text={text}"]
    counters.clear()
    assert main(["train", *fresh, f"--steps={STEPS}", f"--save={whole}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert shapes(out) == shapes(SHOWN)
    assert main(["train", *fresh, f"--steps={STEPS // 2}", f"--save={half}"]) == 0
    assert main(["train", f"--steps={STEPS}", f"--save={half}", f"--resume={half}"]) == 0
    assert f"resumed after {STEPS // 2} steps of {half}" in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] == 2  # of any block, and of the head
    assert not counters["graph_break"]

    found = [torch.load(path)["losses"] for path in (whole, half)]
    assert found[0] == found[1]
    reference, exact = oracle
    assert_close(torch.tensor(found[0]), reference, exact)
    assert exact[-1] < 0.75 * exact[0]


def shapes(text: str) -> set[str]:
    """The lines of what is printed without the curve, and without what differs from run to run."""
    text = re.sub(r"\S+\.pt", "FILE", re.sub(r"^(text +)[^,]*", r"\1FILE", text, flags=re.M))
    text = re.sub(r"threads?,", "threads,", re.sub(r"torch \S+,", "torch VERSION,", text))
    text = re.sub(r" +", " ", re.sub(r"\d[\d,.]*(?<!,)", "#", text))
    return {line.strip() for line in text.splitlines() if not re.search(r"\||--|^ # step", line)}


def test_bf16(train: Callable[..., dict[str, Any]], oracle: tuple[Tensor, Tensor]) -> None:
    """Under autocast, with weights in fp32: as near to fp64 as bf16 is."""
    bf16 = torch.tensor(train("--dtype=bf16", "--steps=10")["losses"])
    wide, exact = (x[:10] for x in oracle)
    assert not torch.equal(bf16, wide)
    assert_close(bf16, wide, exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_resumed_eager(dtype: str, tmp_path: Path, train: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "run.pt"
    options = ["--dtype", dtype, "--seed=3"]
    whole = train(*options, "--steps=7")
    half = train(*options, "--steps=3", "--save", path)
    resumed = train("--steps=7", "--resume", path)
    assert half["saved"] == str(path)
    assert half["losses"] == whole["losses"][:3]
    assert resumed["losses"] == whole["losses"]
    assert {resumed["seed"], resumed["dtype"]} == {3, dtype}
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_seed_is_of_weights_and_batches(train: Callable[..., dict[str, Any]]) -> None:
    runs = [train("--steps=2", "--seed", seed)["losses"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_batches_are_pieces_of_the_text(text: Path) -> None:
    whole = read_text(text)
    raw = text.read_bytes()
    pieces = {bytes(row.tolist()) for step in range(9) for row in whole.batch(0, step, 4, 20)}
    assert len(pieces) > 30
    assert all(len(piece) == 21 and piece in raw for piece in pieces)
    (row,) = whole.batch(0, 0, 1, len(raw) - 1)  # the only piece of this length
    assert bytes(row.tolist()) == raw


def test_a_loss_that_is_not_finite(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    found = train("--lr=1e38", "--steps=40", "--save", path, status=1)
    assert found["fault"].startswith("the loss is not finite after ")
    assert len(found["losses"]) < 40
    assert found["saved"] is None
    assert not path.exists()


def test_ctrl_c_ends_after_a_whole_step(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = tmp_path / "run.pt", Trainer.step

    def interrupted(trainer: Trainer) -> None:
        if trainer.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        step(trainer)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        found = train("--steps=7", "--save", path, status=command.INTERRUPTED)
    assert len(found["losses"]) == 5
    assert signal.getsignal(signal.SIGINT) is handler
    assert train("--steps=7", "--resume", path)["losses"] == train("--steps=7")["losses"]


def test_out_of_memory(
    train: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainer: Trainer) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "step", full)
    found = train(status=1)
    assert found["fault"] == "out of memory; lower --batch or --length"
    assert found["losses"] == []


# ---------------------------------------------------------------------- the baseline


class FlaLayer(fla.KimiDeltaAttention):
    """A layer with the arguments, names of parameters and results of FLA's."""

    def __init__(self, *, safe_gate: bool, **options: Any) -> None:
        assert not safe_gate
        super().__init__(**options)

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), None, None


@pytest.fixture
def fla_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.layers"):
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.KimiDeltaAttention = FlaLayer
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("fla_installed")
def test_the_baseline_has_our_weights(text: Path, oracle: tuple[Tensor, Tensor]) -> None:
    """The same losses, and weights of its own."""
    reference, exact = (x[:10] for x in oracle)
    assert_close(losses(text, "fp32", 10, mixer=FlaMixer), reference, exact)
    ours = kda_ops.KimiDeltaAttention(16, 8, 2)
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in fla_layer(ours).parameters())


@pytest.mark.usefixtures("fla_installed")
def test_baseline(
    text: Path,
    train: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU: ours first, then theirs, in one table and one drawing."""
    monkeypatch.setattr(command, "_check_baseline", lambda *_: None)
    found = train("--steps=3", "--baseline=fla")
    assert found["baseline"]["name"].startswith("FLA ")
    assert len(found["baseline"]["losses"]) == 3
    arguments = [*TINY, "--eager", "--steps=3", "--baseline=fla", f"--text={text}"]
    assert main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^kda-ops +\d\.\d+ +\d\.\d+ +[\d,]+\nFLA .* +\d\.\d+ +\d\.\d+ +[\d,]+$", out, re.M
    )
    assert re.search(r"^ +\* kda-ops   o FLA", out, re.M)


@pytest.mark.parametrize(
    ("installed", "device", "resume", "message"),
    [
        (None, "cuda", None, "needs FLA: pip install flash-linear-attention"),
        ("0.6", "cpu", None, "needs a GPU, got --device cpu"),
        ("0.6", "cuda", {}, "must start with ours, not from --resume"),
    ],
)
def test_baseline_refusals(
    installed: str | None,
    device: str,
    resume: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "fla_version", lambda: installed)
    with pytest.raises(command.Refused, match=message):
        command._check_baseline(torch.device(device), resume)


# ---------------------------------------------------------------------- what is printed


def drawn(*lines: list[float]) -> list[str]:
    """The canvas of curves, row by row."""
    text = curve.draw({str(i): line for i, line in enumerate(lines)})
    return [row.split("|", 1)[1] for row in text.splitlines() if "|" in row]


def test_the_curve_falls_from_corner_to_corner() -> None:
    rows = drawn([5.0 - step / 10 for step in range(curve.WIDTH)])
    assert len(rows) == curve.HEIGHT
    assert rows[0].startswith("**")
    assert rows[-1].endswith(" ***")
    assert len(rows[-1]) == curve.WIDTH
    assert sorted("".join(rows).replace(" ", "")) == ["*"] * curve.WIDTH
    starts = [len(row) for row in rows]
    assert starts == sorted(starts)


def test_a_steep_curve_has_no_gaps() -> None:
    rows = drawn([9.0] * 10 + [1.0] * 50)
    assert all("*" in row for row in rows)
    assert rows[0] == "*" * 10
    assert rows[-1] == " " * 10 + "*" * 50


def test_two_curves() -> None:
    rows = drawn([2.0] * 60, [1.0] * 60)
    assert rows[0] == "*" * 60
    assert rows[-1] == "o" * 60


@pytest.mark.parametrize("losses", [[], [math.nan] * 3], ids=["none", "nan"])
def test_no_curve(losses: list[float]) -> None:
    assert curve.draw({"one": losses}) == ""


def test_a_curve_of_one_loss_and_one_with_nan() -> None:
    assert drawn([3.0])[0] == "*" * 60
    rows = drawn([2.0] * 30 + [math.nan] * 10 + [1.0] * 20)
    assert rows[0] == "*" * 30
    assert rows[-1] == " " * 40 + "*" * 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar() -> None:
    """One line on a terminal, which later text overwrites; a line per tenth elsewhere."""
    for stream in (Terminal(), io.StringIO()):
        with Bar(40, 3, stream) as bar:
            bar.update(4, "a long text")
            bar.update(5, "short")
            bar.update(40, "end")
        shown = stream.getvalue()
        if stream.isatty():
            first, second, third = shown.removesuffix("\n").split("\r")[1:]
            assert first == f"[##{'.' * 22}]  4/40   a long text"
            assert second == f"[###{'.' * 21}]  5/40   short".ljust(len(first))
            assert third.rstrip() == f"[{'#' * 24}] 40/40   end"
        else:
            assert shown == " 4/40   a long text\n40/40   end\n"


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Bar(40, 0, stream) as bar:
        bar.update(4, "a long text")
    assert len(stream.getvalue().strip("\r\n")) == 19


def test_a_picture(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where matplotlib is installed: all losses, by step."""
    plotted, written = [], []

    class Axes:
        def plot(self, steps: Any, losses: Any, **options: Any) -> None:
            plotted.append((options["label"], list(steps), losses))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    class Figure:
        def __init__(self, **_: Any) -> None:
            self.add_subplot = Axes

        def savefig(self, path: Path, **_: Any) -> None:
            written.append(path)

    for name in ("matplotlib", "matplotlib.figure"):
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.Figure = Figure
        monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "curve.svg"
    arguments = [*TINY, "--eager", "--steps=3", f"--text={text}", f"--picture={path}"]
    assert main(["train", *arguments]) == 0
    assert written == [path]
    ((name, steps, drawn_losses),) = plotted
    assert (name, steps, len(drawn_losses)) == ("kda-ops", [1, 2, 3], 3)


def test_json(text: Path, train: Callable[..., dict[str, Any]]) -> None:
    found = train("--steps=1")
    assert len(found["losses"]) == 1
    assert found["tokens_per_second"] is None  # the first step does not count
    found = train("--steps=2")
    assert found["tokens_per_second"] > 0
    assert {name: found[name] for name in SIZES} == SIZES
    assert found["bytes"] == len(text.read_bytes())
    assert found["baseline"] is found["saved"] is found["fault"] is found["peak_bytes"] is None
    assert found["compiled"] is False
    assert found["device_name"].startswith("cpu, ")
    assert (found["torch"], found["triton"]) == (torch.__version__, version("triton"))


def test_the_default_text_is_there() -> None:
    found = read_text(None)
    assert len(found.content) > 10**5
    assert found.path is None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a whole number from 1, got '0'"),
        (["--hidden", "-8"], "argument --hidden: must be a whole number from 1, got '-8'"),
        (["--layers", "two"], "argument --layers: must be a whole number from 1, got 'two'"),
        (["--lr", "0"], "argument --lr: must be a number above 0, got '0'"),
        (["--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["--lr", "inf"], "argument --lr: must be a number above 0, got 'inf'"),
        (["--lr", "fast"], "argument --lr: must be a number above 0, got 'fast'"),
        (["--seed", "-1"], "argument --seed: must be a whole number in [0, 2**63), got '-1'"),
        (["--seed", str(2**63)], "argument --seed: must be a whole number in [0, 2**63)"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got 'meta'"),
        (["--device", "cuda:99"], "argument --device: no such CUDA device is available"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["--save", "nowhere/run.pt"], "argument --save: cannot write nowhere/run.pt"),
        (["--save", "."], "argument --save: cannot write ."),
        (["--picture", "curve.txt"], "argument --picture: must end in .png, .svg, .pdf"),
        (["--baseline", "mamba"], "argument --baseline: invalid choice: 'mamba'"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_a_picture_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["train", "--picture", "curve.png"])
    assert "it needs matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must refuse before it starts, and returns what it says."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["train", "--device=cpu", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        return line.removeprefix("python -m kda_ops train: error: ")

    return call


def test_options_that_do_not_fit(refused: Callable[..., str], text: Path) -> None:
    assert refused("--hidden=10", "--heads=3") == (
        "--hidden must be a multiple of --heads, got 10 and 3"
    )
    assert refused("--hidden=514", "--heads=2") == "--hidden / --heads must be at most 256, got 257"
    size = len(text.read_bytes())
    assert refused(f"--text={text}", f"--length={size}") == (
        f"the text must have more than --length = {size} bytes, words.txt has {size}"
    )
    args: Any = types.SimpleNamespace(device=torch.device("cuda"))
    settings = Settings(**SIZES, lr=1.0, seed=0, dtype="fp64")
    with pytest.raises(command.Refused, match="--dtype fp64 needs --device cpu, got cuda"):
        command._check(args, settings, read_text(text), None)


def test_checkpoints_that_do_not_fit(
    refused: Callable[..., str], train: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    path, other, own = tmp_path / "run.pt", tmp_path / "other.pt", tmp_path / "own.txt"
    own.write_bytes(text.read_bytes())
    assert refused("--resume", path) == (
        f"argument --resume: cannot read {path}: No such file or directory"
    )
    wrong = f"argument --resume: {other} is no checkpoint of this command"
    other.write_text("not a checkpoint")
    assert refused("--resume", other) == wrong
    other.write_bytes(b"")
    assert refused("--resume", other) == wrong
    torch.save({"model": {}}, other)
    assert refused("--resume", other) == wrong
    assert refused("--resume", tmp_path) == wrong.replace(str(other), str(tmp_path))
    train("--steps=2", "--save", path, f"--text={own}")
    assert refused("--resume", path, "--steps=2") == (
        f"--steps must be more than the 2 of {path}, got 2"
    )
    assert refused("--resume", path, "--hidden=32") == f"--hidden must be 16, as in {path}, got 32"
    own.write_text("something else")
    assert refused("--resume", path) == (
        f"own.txt has changed since {path}; name a text with --text"
    )
    own.unlink()
    assert refused("--resume", path) == (
        f"cannot read {own}: No such file or directory; name a text with --text"
    )
    assert len(train("--steps=3", "--resume", path)["losses"]) == 3  # on another text, by name


def test_a_python_without_help_topics(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert refused() == "this Python has no help topics: name a text with --text"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in (*SIZES, "text", "device", "steps", "lr", "seed", "dtype", "eager", "save",
                   "resume", "baseline", "picture", "json", "tp", "dp", "fsdp"):  # fmt: skip
        assert f"--{option}" in out
    assert "(default: 64, 512 on a GPU)" in re.sub(r"\s+", " ", out)


# ---------------------------------------------------------------------- the page


def test_the_commands_of_the_page_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one folder; eager, short and on another text."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m kda_ops train.*$", PAGE, re.MULTILINE)
    assert len(commands) >= 2
    for number, line in enumerate(commands, 1):
        arguments = shlex.split(line, comments=True)[3:]
        short = ["--eager", f"--text={text}", f"--steps={2 * number}", "--device=cpu"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*arguments, *short]) == 0, line
        assert "kda-ops" in out.getvalue()


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
# torch 2.11 looks at the gradient of every input of a graph, also of what another one computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_training_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16, 300 steps: all that can be learnt is learnt, compiled as well as eager."""
    words = tmp_path / "words.txt"
    words.write_text(in_random_order(60_000))  # too many to learn their order by heart

    def curve_of(*options: str) -> Tensor:
        capsys.readouterr()
        sizes = ["--hidden=128", "--layers=2", "--heads=2", "--batch=8", "--length=256"]
        arguments = ["--device=cuda", "--lr=2e-3", "--steps=300", f"--text={words}", "--json"]
        assert main(["train", *sizes, *arguments, *options]) == 0
        found = json.loads(capsys.readouterr().out)["losses"]
        return torch.tensor(found).unflatten(0, (12, 25)).mean(1)

    wide = curve_of("--dtype=fp32", "--eager").double()
    eager, compiled = curve_of("--dtype=bf16", "--eager"), curve_of("--dtype=bf16")
    assert_close(compiled, eager, wide, torch.bfloat16)
    shares = [count / len(WORDS) for count in Counter(WORDS).values()]
    per_word = -sum(share * math.log(share) for share in shares)
    entropy = per_word * 60_000 / len(words.read_bytes())
    assert 0.95 * entropy < compiled[-1] < 1.3 * entropy
