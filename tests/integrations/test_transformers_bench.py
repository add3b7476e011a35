"""transformers' layer as a baseline of `python -m kda_ops bench`."""

import json
from typing import Any

import pytest
import torch

from kda_ops.__main__ import main
from kda_ops.demos.bench import providers
from tests.support import transformers_models  # imports the layer without FLA


def test_it_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transformers_models.kimi_linear
    monkeypatch.setattr(providers, "fla_version", lambda: None)
    small = ["--device=cpu", "--hidden=24", "--heads=2", "--head-dim=8", "--tokens=70", "--batch=3"]
    for kind in ("prefill", "decode", "train"):
        arguments = ["bench", kind, *small, "--eager", "--seconds=0.01", "--json"]
        assert main(arguments) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        (error,) = (x["error"] for x in found["rows"] if x["name"].startswith("transformers 5"))
        assert error < 1e-5


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    task = providers.Task("prefill", None, torch.zeros(1))  # type: ignore[arg-type]
    monkeypatch.setattr(providers, "fla_version", lambda: "0.6.0")
    with pytest.raises(providers.LeftOut, match="where FLA is installed it needs a GPU"):
        providers.transformers(task)
