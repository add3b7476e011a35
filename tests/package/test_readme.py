"""What README.md says holds: its Python blocks run, its table names every operator, its commands
and files exist.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kda_ops
from tests.support.operators import NAMES

ROOT = Path(kda_ops.__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
EXPLAIN = README[README.index("### What became of your model") : README.index("### Around")]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int) -> None:
    # compiled with a file name of its own, so that a traceback says where it is from
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})


def test_the_table_names_every_operator() -> None:
    table = README[README.index("## Operators") : README.index("## How lowering")]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(rows) == NAMES
    assert set(rows) <= set(kda_ops.__all__)


def test_its_commands_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([\w-]+)`?", README))
    assert {"demo", "test"} <= named <= targets


def test_its_explanation_is_what_the_command_prints(tmp_path: Path) -> None:
    (command,) = re.findall(r"^```bash\n(.*?)^```$", EXPLAIN, re.DOTALL | re.MULTILINE)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", EXPLAIN, re.DOTALL | re.MULTILINE)
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = iter(done.stdout.splitlines())
    for line in shown.splitlines():  # in order, with more between them
        assert line in printed, line
    assert (tmp_path / "explain.html").read_text().startswith("<!DOCTYPE html>")


def test_its_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_it_has_a_place_for_measurements() -> None:
    assert README.index("<!-- perf:begin -->") < README.index("<!-- perf:end -->")
