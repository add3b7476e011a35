"""Everything that the command line offers, from an installed wheel: `python -m tests.support.wheel
FOLDER`.

Takes the only wheel in a folder, installs it in a new environment on top of the running
interpreter's packages, and runs the commands there from an empty folder. Prints what it ran; fails
with the output of the first command that misbehaves.
"""

import email
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import kda_ops

ROOT = Path(kda_ops.__file__).parent.parent
LINK = ROOT / "kda_ops" / "lowering"
FOLDERS = {  # where they are in the wheel
    ROOT / "kda_ops": Path("kda_ops"),
    ROOT / "lowering": Path("kda_ops", "lowering"),
}
SOURCES = (".py", ".cpp", ".h")
MODEL = """
import torch
from kda_ops.nn.layer import KimiDeltaAttention

def factory():
    return KimiDeltaAttention(64, 64, 1, dtype=torch.bfloat16), (torch.randn(1, 8, 64).bfloat16(),)
"""


class Command(NamedTuple):
    """A command of the package, its exit status, and its output as regular expressions."""

    arguments: str
    says: tuple[str, ...]
    status: int = 0


HELP = [
    Command("--help", ("usage: ", "demo", "train", "explain", "pd-demo")),
    Command("demo --help", (r"--text FILE", r"fp64")),
    Command("bench --help", (r"--picture FILE\.svg", r"every baseline that is installed")),
    Command("doctor --help", (r"--json \[FILE\]",)),
    Command("train --help", (r"--resume PATH", r"bit for bit")),
    Command("explain --help", (r"module:factory", r"--html FILE")),
    Command("pd-demo --help", (r"--prefill-tp", r"NIXL")),
]
WRONG = [
    Command("", (r"required: command",), 2),
    Command("nothing", (r"invalid choice: 'nothing'",), 2),
    Command("demo --tokens none", (r"must be a whole number from 1, got 'none'",), 2),
    Command("train --hidden 10 --heads 3", (r"must be a multiple of --heads",), 2),
    Command("explain my_model", (r"must be module:factory, got 'my_model'",), 2),
    Command("explain no_such_model:factory", (r"there is no module 'no_such_model'",), 2),
    Command("pd-demo --tokens 3", (r"must be a whole number from 17, got '3'",), 2),
]
RIGHT = [
    Command(
        "demo --device cpu --tokens 70 --heads 1",
        (r"compiled_layer\.py, 70 bytes", r"all is well\n$"),
    ),
    Command(
        "bench decode --eager --device cpu --hidden 32 --heads 1 --head-dim 16 --seconds 0.01",
        (r"kda_ops, eager +\d",),
    ),
    Command("doctor", (r"kda-ops +\d", r"torch +\d")),
    Command("train --eager --device cpu --steps 2", (r"help topics", r"\nkda-ops ")),
    Command("explain my_model:factory --html my_model.html", (r"chunk_kda_gated", r"8 -> 4")),
]
PD_DEMO = Command(
    "pd-demo --decode-tp 1 --tokens 17 --layers KA", (r"all tokens equal those of one process\n$",)
)
WITHOUT_NIXL = Command("pd-demo", (r"it needs NIXL: pip install",), 2)


def commands(nixl: bool) -> list[Command]:
    """All that are run; the transfers only where NIXL is installed."""
    return [*HELP, *WRONG, *RIGHT, PD_DEMO if nixl else WITHOUT_NIXL]


def check_contents(wheel: Path) -> None:
    """The wheel has every source file of the packages and nothing else, and says what it needs."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
        (scripts,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "kda-ops = kda_ops.__main__:main" in archive.read(scripts).decode()
    sources = {
        (under / path.relative_to(folder)).as_posix()
        for folder, under in FOLDERS.items()
        for path in folder.rglob("*")
        if path.suffix in SOURCES and LINK not in path.parents
    }
    assert set(names) == sources, set(names) ^ sources
    assert metadata["Name"] == "kda-ops"
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [re.split(r"[>;]", need)[0] for need in needs] == ["torch", "triton"], needs
    assert metadata.get_payload().startswith("# kda-ops")


def install(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel, and the packages of this one behind it; its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True, timeout=120)
    # behind the wheel, and no site directory: what it says of an installed checkout is not read
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return python


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of a command that sees only the environment."""
    outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in outside}
    done = subprocess.run(
        command,
        cwd=folder,
        env={"TORCHINDUCTOR_COMPILE_THREADS": "1", **kept},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def fault(command: Command, status: int, output: str) -> str | None:
    """What a command did wrong."""
    if status != command.status:
        return f"expected exit status {command.status}, got {status}"
    if "Traceback" in output:
        return "expected no traceback"
    missing = [text for text in command.says if not re.search(text, output)]
    return f"expected {missing} in its output" if missing else None


def main(folder: str) -> int:
    (wheel,) = Path(folder).glob("kda_ops-*.whl")
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        python = install(wheel, Path(temporary, "environment"))
        empty = Path(temporary, "empty")
        empty.mkdir()
        status, found = run([str(python), "-c", "import kda_ops; print(kda_ops.__file__)"], empty)
        assert status == 0, found
        assert Path(found).is_relative_to(Path(temporary).resolve()), f"not the wheel's: {found}"
        (empty / "my_model.py").write_text(MODEL)
        script = str(python.with_name("kda-ops"))
        chosen = commands(importlib.util.find_spec("nixl") is not None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ends = pool.map(lambda c: run([script, *c.arguments.split()], empty), chosen)
            for command, (status, output) in zip(chosen, ends, strict=True):
                print(f"kda-ops {command.arguments}", flush=True)
                if (wrong := fault(command, status, output)) is not None:
                    print(f"{output}\nFAILED: {wrong}")
                    return 1
        status, output = run([str(python), "-m", "kda_ops", "--help"], empty)
        assert (status, output[:5]) == (0, "usage"), output
    print(f"{wheel.name}: every command runs from it")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
