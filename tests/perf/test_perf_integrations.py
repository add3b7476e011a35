"""Benchmarks of the integrations without a GPU: rows of a tiny model, their checks, targets and
pages.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from kda_ops.integrations.transformers import KDALayer, restore
from perf import bench_fla_layer, bench_models
from perf.analysis import report, targets
from perf.baselines import kimi_linear
from perf.bench_models import Decode, Prefill, Side
from perf.harness import machine, rows
from perf.harness.rows import COMPILED, OURS, Call, Row
from tests.perf.test_perf_harness import measure
from tests.perf.test_perf_report import make_result

CPU = torch.device("cpu")
DOCS = Path(machine.HISTORY).parent.parent / "docs"
TRANSFORMERS, FLA = "transformers 5.24.0 with FLA 0.6.0", "FLA 0.6.0"
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense"] * 2,
    "initializer_range": 0.2,
}
SIZES = {"VOCABULARY": 61, "PREFILLS": (70,), "BATCHES": (2,), "STEPS": 2, "CACHE_TOKENS": 80}


@pytest.fixture
def _installed() -> Iterator[None]:
    with (
        mock.patch.object(bench_models, "transformers", lambda side: {TRANSFORMERS: side}),
        mock.patch.object(bench_fla_layer, "fla", lambda side: {FLA: side}),
    ):
        yield


@pytest.fixture
def _tiny(_installed: None) -> Iterator[None]:
    """Nothing is compiled, as the integrations' own tests do that."""
    importlib.import_module("tests.support.transformers_models")  # without FLA, which needs a GPU
    config = kimi_linear.CONFIG | TINY
    caches = (bench_models.checked, bench_models.reference, kimi_linear.unmodified)
    with (
        torch.no_grad(),
        mock.patch.multiple(bench_models, **SIZES),
        mock.patch.object(kimi_linear, "CONFIG", config),
        mock.patch.object(torch, "compile", side_effect=lambda model, **options: model),
    ):
        yield
    for cached in caches:
        cached.cache_clear()


# ---------------------------------------------------------------------- models


@pytest.mark.usefixtures("_tiny")
def test_every_way_is_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bench_models.SLOW, raising=False)
    found = bench_models.model_rows()
    theirs, ours = f"{TRANSFORMERS}, eager", (f"{OURS}, eager", COMPILED)
    assert [(row.stage, row.case, row.provider) for row in found] == [
        *(("model prefill", "T70", provider) for provider in (theirs, *ours)),
        *(
            ("model decode", "batch2", provider)
            for provider in (theirs, f"{TRANSFORMERS}, compiled", *ours)
        ),
    ]
    measurer = rows.Measurer(CPU, 1 << 10, {})
    monkeypatch.setattr(bench_models, "ROWS", found)
    monkeypatch.setattr(bench_models, "DEVICE", CPU)
    monkeypatch.setattr(
        bench_models, "times_of_first", lambda *calls: sum(x() is not None for x in calls) / 4
    )
    for row, (side, case) in found.items():
        benchmark = SimpleNamespace(extra_info={})

        def measured(row: Row, benchmark: Any = benchmark) -> None:
            benchmark.extra_info |= measure(measurer, row)

        bench_models.bench_models(row, measured, benchmark)
        facts = benchmark.extra_info
        assert facts["us"] == 1.0
        assert 0 < facts["error"] < 0.05, row
        assert 0 < facts["error_ratio"] <= bench_models.WORSE, row
        assert ("compile_seconds" in facts) == side.compiled
        assert facts.get("in_turn") == (0.5 if side.ours and isinstance(case, Decode) else None)
        json.dumps(facts)
    compiled: Any = torch.compile
    graphs = [found.kwargs["fullgraph"] for found in compiled.call_args_list]
    assert graphs == [True, False, True, False]  # theirs may break; again, to take turns


@pytest.mark.usefixtures("_tiny")
def test_rows_do_not_change_one_another() -> None:
    """Ours have layers of their own around the same weights."""
    model = kimi_linear.unmodified(CPU)
    before = [id(x) for x in model.parameters()]
    other = kimi_linear.accelerated(CPU)
    assert any(isinstance(x, KDALayer) for x in other.modules())
    assert not any(isinstance(x, KDALayer) for x in model.modules())
    assert [id(x) for x in other.parameters()] == before == [id(x) for x in model.parameters()]
    assert {x.dtype for x in kimi_linear.exact(CPU).parameters()} == {torch.float32}
    assert torch.bfloat16 in {x.dtype for x in model.parameters()}
    restore(other)
    assert [type(x) for x in other.modules()] == [type(x) for x in model.modules()]
    module = importlib.import_module(kimi_linear.MODULE)
    wrapped = [getattr(module, name) for name in kimi_linear.FUNCTIONS]
    with kimi_linear.without_kernels():
        inside = [getattr(module, name) for name in kimi_linear.FUNCTIONS]
        assert inside == [x.__wrapped__ for x in wrapped]
    assert [getattr(module, name) for name in kimi_linear.FUNCTIONS] == wrapped


@pytest.mark.usefixtures("_tiny")
def test_a_model_that_is_further_from_fp32_is_not_measured() -> None:
    case, make = Prefill(70), kimi_linear.accelerated

    def worse(device: torch.device) -> nn.Module:
        model = make(device)
        layer = next(x for x in model.modules() if isinstance(x, KDALayer))
        layer.o_norm.weight = nn.Parameter(layer.o_norm.weight * 1.05)
        return model

    with (
        mock.patch.object(bench_models, "accelerated", worse),
        pytest.raises(ValueError, match=r"times as far as the unmodified model, more than 1.05"),
    ):
        Side(True, False).prepare(case)(bench_models.inputs_of(case, CPU))


@pytest.mark.usefixtures("_installed")
def test_what_compiles_for_minutes_needs_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = f"{TRANSFORMERS}, compiled"
    monkeypatch.delenv(bench_models.SLOW, raising=False)
    assert slow not in bench_models.sides(Prefill(4096))
    assert slow in bench_models.sides(Decode(1))
    monkeypatch.setenv(bench_models.SLOW, "1")
    found = bench_models.rows_of(Prefill(4096), "model prefill", "T4096", 0, 0)
    with mock.patch.object(bench_models, "ROWS", found):
        marks = {row.provider: bench_models.with_limit(row).marks for row in found}
    assert [provider for provider, limits in marks.items() if limits] == [slow]


def test_names_say_whether_transformers_has_kernels() -> None:
    for installed, fla, expected in (
        ("5.24.0", "0.6.0", [TRANSFORMERS]),
        ("5.24.0", None, ["transformers 5.24.0, no kernels"]),
        (None, "0.6.0", []),
    ):
        with (
            mock.patch.object(kimi_linear, "version", return_value=installed),
            mock.patch.object(kimi_linear, "fla_version", return_value=fla),
        ):
            assert list(kimi_linear.transformers(None)) == expected
            if not expected:
                with mock.patch.object(bench_models, "transformers", kimi_linear.transformers):
                    assert bench_models.model_rows() == {}


def test_weights_are_counted() -> None:
    """Against the model itself, which needs no memory on the meta device."""
    pytest.importorskip("transformers.models.kimi_linear")
    importlib.import_module("tests.support.transformers_models")
    from transformers import AutoModelForCausalLM, KimiLinearConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(KimiLinearConfig(**kimi_linear.CONFIG))
    matrices = {
        name: x.numel()
        for name, x in model.named_parameters()
        if x.dim() == 2 and "embed" not in name
    }
    assert sum(matrices.values()) == bench_models.MODEL_WEIGHTS


@pytest.mark.usefixtures("_tiny")
def test_an_old_transformers_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "Cache", object)
    found = bench_models.rows_of(Decode(2), "model decode", "batch2", 0, 0)
    row, measurer = next(iter(found)), rows.Measurer(CPU, 1 << 10, {})
    with pytest.raises(pytest.skip.Exception, match=r"older than 5.24"):
        bench_models.bench_models(row, lambda row: measure(measurer, row), SimpleNamespace())


# ---------------------------------------------------------------------- FLA's layer


@pytest.mark.usefixtures("_installed")
def test_flas_layer_is_patched_while_its_row_is_measured() -> None:
    pytest.importorskip("fla")
    importlib.import_module("tests.support.fla_layers")
    from fla.ops import kda

    from kda_ops.integrations.fla import chunk_kda

    theirs = kda.chunk_kda
    seen = []

    def measured(row: Row) -> None:
        bench_fla_layer.patched({})
        seen.append(kda.chunk_kda)
        raise ValueError(row)

    with pytest.raises(ValueError, match="FLAlayer"):
        bench_fla_layer.bench_fla_layer(bench_fla_layer.ROWS[1], measured)
    assert seen == [chunk_kda]
    assert kda.chunk_kda is theirs


def test_flas_layer_patched_is_ours() -> None:
    """Forward and the gradient of its input against our layer with the same weights, small."""
    pytest.importorskip("fla")
    importlib.import_module("tests.support.fla_layers")
    from perf import bench_layer, bench_training

    torch.manual_seed(0)
    ours = bench_layer.KimiDeltaAttention(32, 16, 2, dtype=torch.bfloat16)
    theirs = bench_layer.fla_layer_like(ours).train()
    x, do = torch.randn(2, 1, 70, 32).bfloat16()

    def first(step: Call) -> Call:
        """The output and the first gradient: those of weights are in another order."""

        def call() -> Any:
            o, gradients = step()
            return o, gradients[0]

        return call

    row = Row(
        *("FLA layer training", "T70", COMPILED),
        make=lambda device: {"hidden_states": x, "do": do},
        prepare=lambda inputs: first(bench_fla_layer.patched_step(inputs)),
        expected=lambda inputs: first(bench_training.step_of(ours, ours, inputs)),
        poison=False,
        limit=bench_fla_layer.GRADIENTS_AGREE,
    )
    with (
        torch.no_grad(),
        mock.patch.object(bench_fla_layer, "trained_fla_layer", return_value=theirs),
        mock.patch.object(bench_fla_layer, "compiled_layer", return_value=theirs),
    ):
        try:
            assert 0 < rows.check(row, CPU) < bench_fla_layer.GRADIENTS_AGREE
            with pytest.raises(ValueError, match="more than 1e-09"):
                rows.check(dataclasses.replace(row, limit=1e-9), CPU)
        finally:
            bench_fla_layer.unpatch()


# ---------------------------------------------------------------------- targets and pages


@pytest.mark.usefixtures("_installed")
def test_targets_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds ours and its baseline among the rows of a run."""
    monkeypatch.setenv(bench_models.SLOW, "1")
    layer = [
        *(("FLA layer", x) for x in bench_fla_layer.sides(lambda x: x, lambda x: x)),
        *(("FLA layer training", x) for x in bench_fla_layer.sides(lambda x: x, lambda x: x)),
    ]
    found = [(row.stage, row.case, row.provider) for row in bench_models.model_rows()]
    found += [(stage, bench_fla_layer.CASE, provider) for stage, provider in layer]
    timed = [
        {"stage": stage, "case": case, "provider": provider, "us": 2.0 + i, "eager_us": 3.0 + i}
        for i, (stage, case, provider) in enumerate(found)
    ]
    goals = [*targets.MODELS, *targets.FLA_LAYER]
    assert targets.targets_for(timed) == [*targets.TARGETS, *goals]
    for goal in goals:
        baseline, ours = (
            [
                row
                for row in timed
                if (row["stage"], row["case"]) == (goal.stage, goal.case)
                and row["provider"].startswith(OURS) == is_ours
                and all(word in row["provider"] for word in words.split())
            ]
            for is_ours, words in ((False, goal.baseline), (True, goal.ours))
        )
        assert len(baseline) == len(ours) == 1, goal
        key = "eager_us" if goal.measure == "wall" else "us"
        expected = baseline[0][key] / ours[0][key]
        expected = 1 / expected if goal.measure == "share" else expected
        assert targets.value_of(goal, timed) == expected, goal


def test_their_compiled_prefill_is_known_where_it_was_not_run() -> None:
    ours = {"stage": "model prefill", "case": "T4096", "provider": COMPILED, "us": 10_200.0}
    (goal,) = (goal for goal in targets.MODELS if goal.known_us)
    assert targets.value_of(goal, [ours]) == 0.25
    assert not goal.met(0.25, goal.required)
    assert "40800 us where it was not run" in str(goal)


def measured_run(path: Path) -> Path:
    """A prefill, a decode step and FLA's layer, beside a gate."""
    timed = [
        ("model prefill", "T4096", f"{TRANSFORMERS}, eager", 15_000.0, {"error_ratio": 1.0}),
        ("model prefill", "T4096", COMPILED, 6_000.0, {"error_ratio": 0.9, "compile_seconds": 14}),
        ("model decode", "batch1", f"{TRANSFORMERS}, eager", 5_000.0, {"error_ratio": 1.0}),
        ("model decode", "batch1", f"{OURS}, eager", 4_000.0, {"error_ratio": 0.95}),
        ("FLA layer", bench_fla_layer.CASE, f"{FLA}, eager", 3_000.0, {}),
        ("FLA layer", bench_fla_layer.CASE, COMPILED, 1_500.0, {}),
        ("gate", "small", OURS, 4.0, {}),
    ]
    found = []
    for stage, case, provider, us, facts in timed:
        row = make_result(provider, us, stage=stage, case=case)
        found.append(row | {"eager_us": us + 500, "kernel_us": us - 500} | facts)
    path.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in found]}))
    return path


def test_each_integration_has_its_page(tmp_path: Path) -> None:
    names = ("performance.md", "integrations.md", "integrations-fla.md")
    performance, models, layer = pages = [tmp_path / name for name in names]
    for page in pages:
        page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    run = str(measured_run(tmp_path / "run.json"))
    options = ("--page", "--models", "--fla-layer")
    arguments = [str(x) for pair in zip(options, pages, strict=True) for x in pair]
    assert report.main([run, *arguments]) == 0
    text = performance.read_text()
    links = "[models](integrations.md), [FLA's layer](integrations-fla.md)"
    assert f"On pages of their own: {links}." in text
    assert "| gate | small |" in text
    assert "model prefill" not in text
    assert "FLA layer" not in text
    text = models.read_text()
    assert text.startswith(f"before\n\n{report.BEGIN}\n### Speed on a GPU\n\nNVIDIA H200")
    columns = "| queued, ms | one call, ms | kernels, ms | launches | compiling, s | RMSE |"
    assert f"| what | case | provider {columns}" in text
    assert "| model prefill | T4096 | kda_ops, compiled | 6 | 6.5 | 5.5 | 1 | 14 | 0.9 |" in text
    assert f"| model decode | batch1 | {TRANSFORMERS}, eager | 5 | 5.5 | 4.5 | 1 |  | 1 |" in text
    goal = "| model prefill T4096, compiled, against FLA eager | baseline / ours | 2 |  | 2.5 | met"
    assert goal in text
    assert "batch1, eager, against FLA eager | baseline / ours, eager calls | 1 |  | 1.22 |" in text
    assert "batch16, eager, against FLA eager" in text
    assert "| gate |" not in text
    assert "old" not in text
    text = layer.read_text()
    assert "## Speed on a GPU" in text
    assert "| FLA layer | T8192-H32 | kda_ops, compiled | 1.5 | 2 | 1 | 1 |\n" in text
    assert "| FLA layer T8192-H32, against FLA eager | baseline / ours | 1.5 |  | 2 | met |" in text
    assert "RMSE" not in text


def test_pages_without_a_run_are_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": [{"extra_info": make_result(OURS, 4.0)}]}))
    page = tmp_path / "integrations.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for option in ("--models", "--fla-layer"):
        assert report.main([str(run), option, str(page)]) == 0
        assert page.read_text() == f"before\n{report.BEGIN}\n{report.END}\nafter\n"
    assert targets.main([str(run)]) == 1
    out = capsys.readouterr().out
    for name in targets.OPTIONAL:
        assert f"No rows of {name}: its targets are left out." in out


def test_the_pages_have_room() -> None:
    assert set(report.PAGES) == set(targets.OPTIONAL)
    for name in report.PAGES.values():
        text = (DOCS / name).read_text()
        assert text.count(report.BEGIN) == text.count(report.END) == 1
