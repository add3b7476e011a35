"""`python -m kda_ops doctor`."""

import json
from typing import Any

import pytest
import torch

from kda_ops import config
from kda_ops.__main__ import main
from kda_ops._cases import operator_packages
from kda_ops.demos import doctor


def findings(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, dict[str, Any]]:
    status = main(["doctor", "--json", *options])
    report = json.loads(capsys.readouterr().out)
    found = {x["name"]: x for x in report["findings"]}
    assert status == report["exit_status"] == any(x["status"] == "error" for x in found.values())
    return found


def test_every_operator_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "--device", "cpu")
    tried = [x for x in found.values() if x["topic"] == "operators on cpu"]
    assert [x["name"] for x in tried] == list(operator_packages())
    assert {x["status"] for x in tried} == {"ok"}
    assert found["torch"]["text"] == torch.__version__


@pytest.mark.gpu
def test_every_operator_is_tried_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "--device", "cuda")
    tried = [x for x in found.values() if x["topic"] == "operators on cuda"]
    assert {x["status"] for x in tried} == {"ok"}


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("\nsoftware\n") < out.index("\ndevices\n") < out.index("\ncaches\n")
    assert "0 errors (x)" in out


def test_what_does_not_work_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = doctor.public_function

    def broken(name: str) -> Any:
        if name == "gate":
            raise RuntimeError("no kernel\nfor this")
        if name == "l2norm":
            return lambda **inputs: function(name)(**inputs) * (2 - (config.impl == "reference"))
        return function(name)

    monkeypatch.setattr(doctor, "public_function", broken)
    found = findings(capsys, "--device", "cpu")
    assert found["gate"]["text"] == "RuntimeError: no kernel"
    assert found["l2norm"]["text"] == "wrong: relative error 1.0e+00"
    wrong = {name for name, x in found.items() if x["status"] == "error"}
    assert wrong == {"gate", "l2norm"}


def test_slow_settings_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "check_values", True)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    found = findings(capsys, "--no-run")
    assert found["check_values"]["status"] == "warning"
    assert found["TORCH_COMPILE_DISABLE"]["status"] == "warning"
    assert found["impl"]["status"] == "ok"


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "transformers": "5.17.0", "fla-core": "0.6.0"}
    monkeypatch.setattr(doctor, "version", versions.get)
    software = {x.name: x for x in doctor.software()}
    assert software["torch"].status == "error"
    assert software["triton"].status == "warning"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    named = {x.name: x for x in doctor.combinations()}
    assert named["transformers"].status == "warning"
    assert named["FLA without a GPU"].status == "warning"


def test_no_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
