"""Other values of a kernel, timed on the rows of the benchmarks."""

import argparse
from typing import Any

import pytest
import torch

from kda_ops.tuning import choose
from perf import sweep
from perf.harness.rows import OURS, Row


def test_values() -> None:
    assert sweep.values_of("BLOCK=64,form=fused") == {"BLOCK": 64, "form": "fused"}
    with pytest.raises(argparse.ArgumentTypeError, match="is not like"):
        sweep.values_of("BLOCK")


def test_rows() -> None:
    found = sweep.rows_like("CORE TRAINING")
    assert found
    assert {row.provider for row in found} == {OURS}
    assert {row.stage for row in found} == {"core training"}


def test_each_value_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped values first and last; those that are wrong are not timed."""
    chosen = []

    def prepare(inputs: dict[str, Any]) -> Any:
        block = choose("gate", torch.device("cpu"), K=8)["TILE"]
        chosen.append(block)
        return lambda: inputs["x"] * (2 if block == 3 else 1)

    def make(device: torch.device) -> dict[str, Any]:
        return {"x": torch.ones(3, device=device)}

    row = Row("gate", "small", OURS, make, prepare, lambda inputs: lambda: inputs["x"])
    monkeypatch.setattr(sweep, "gpu", lambda: {"l2_bytes": 0})
    monkeypatch.setattr(sweep, "seconds", lambda *_: 2e-6)
    cpu, candidates = torch.device("cpu"), [{"TILE": 2}, {"TILE": 3}]
    first, good, wrong, last = sweep.sweep("gate", row, candidates, cpu)
    assert first == last == (sweep.SHIPPED, 2e-6, "")
    assert good == ("TILE=2", 2e-6, "")
    assert wrong[:2] == ("TILE=3", None)
    assert "off by" in wrong[2]
    assert chosen[1:3] == [2, 3]
    _, partial, _ = sweep.sweep("gate", row, [{"num_warps": 8}], cpu)
    assert partial == ("num_warps=8", 2e-6, "")  # what is left out is as shipped
    assert chosen[-2] == chosen[0]


def test_a_failed_gpu_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered\nmore")

    row = Row("gate", "small", OURS, lambda _: {}, lambda _: lambda: None, None)
    monkeypatch.setattr(sweep, "gpu", lambda: {"l2_bytes": 0})
    monkeypatch.setattr(sweep, "check", fail)
    found = list(sweep.sweep("gate", row, [{"TILE": 2}], torch.device("cpu")))
    assert found == [(sweep.SHIPPED, None, "an illegal memory access was encountered")]


def test_what_cannot_be_swept(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["state_copy", "--row", "no such row"], "no row of ours"),
        (["states_forward", "--row", "core"], "has no candidates"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(arguments)
        assert reason in capsys.readouterr().err
