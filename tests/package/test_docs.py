"""README.md and docs/ are correct: their Python blocks run, the tables name every operator, their
commands, files and links exist.
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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
COMPILE = (ROOT / "docs" / "compile.md").read_text()
ELSEWHERE = {
    "inductor-rollback.md",  # its script runs in tests/lowering/test_rollback.py
    "integrations-fla.md",  # in tests/integrations/test_fla.py, where that is installed
    "parallel.md",  # its script runs on two ranks, in tests/nn/test_parallel.py
}
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in ELSEWHERE
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, request: pytest.FixtureRequest) -> None:
    # compiled with a unique file name, for tracebacks
    exec(compile(block, request.node.callspec.id, "exec"), {})


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_table_names_every_operator() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == NAMES
    documented = set(re.findall(r"^::: kda_ops\.(?:fused\.)?(\w+)$", page, re.MULTILINE))
    assert set(NAMES) <= documented
    assert set(NAMES) <= set(kda_ops.__all__) | set(kda_ops.fused.__all__)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"(?:: |- )([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([\w-]+)", page.read_text()))
        named |= set(re.findall(r"^make ([\w-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page.name
    assert {"demo", "test"} <= set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))


def test_modules_that_are_named_exist() -> None:
    """Paths of files, and dotted names of this package's modules and their members."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        text = page.read_text()
        for path in re.findall(r"`((?:kda_ops|lowering|tests|perf|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
        for name in re.findall(r"(?<![/\w.])kda_ops(?:\.\w+)+", text):
            assert resolves(name), f"{page.name} names {name}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a member of one."""
    import importlib

    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_explanation_is_what_the_command_prints(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^```bash\n(python -m kda_ops explain.*?)^```$", COMPILE, re.DOTALL | re.MULTILINE
    )
    (shown,) = re.findall(r"^```text\n(.*?)^```$", COMPILE, re.DOTALL | re.MULTILINE)
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


def test_links_exist() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_performance_page_has_its_markers() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.index("<!-- perf:begin -->") < page.index("<!-- perf:end -->")
