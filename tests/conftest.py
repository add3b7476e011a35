"""Which tests run where.

`gpu` needs a CUDA device, `nixl` the package of that name, `interpreter` needs TRITON_INTERPRET=1,
the rest needs it unset. `--nixl` leaves the second kind out, or everything else.
"""

import importlib.util
import os

import pytest
import torch

from kda_ops import config

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETER:
    from tests.support.interpreter import patch_interpreter

    patch_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nixl",
        choices=("with", "without", "only"),
        default="with",
        help="tests between processes over NIXL, which want the machine to themselves",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    nixl = config.getoption("--nixl")
    installed = importlib.util.find_spec("nixl") is not None
    for item in items:
        if item.get_closest_marker("gpu"):
            keep = torch.cuda.is_available() and not INTERPRETER
        else:
            keep = bool(item.get_closest_marker("interpreter")) == INTERPRETER
        if item.get_closest_marker("nixl"):
            keep = keep and installed and nixl != "without"
        else:
            keep = keep and nixl != "only"
        (kept if keep else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(autouse=True)
def _configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test, or a document's snippet, sets in the configuration is set back."""
    for name in ("impl", "conv_layout", "check_values", "deterministic_tuning", "saved_bytes"):
        monkeypatch.setattr(config, name, getattr(config, name))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Each test compiles from scratch."""
    torch.manual_seed(0)
    torch._dynamo.reset()
