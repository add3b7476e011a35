"""Analysis of runs, without a GPU: targets met or missed, worse rows, bars of the picture."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from perf.analysis import compare, picture, targets
from perf.analysis.targets import Target
from perf.harness import machine
from perf.harness.rows import OURS

BASELINE = "FLA 0.6.0"


def row(provider: str, us: float, **changes: Any) -> dict[str, Any]:
    return {
        "stage": "core",
        "case": "small",
        "provider": provider,
        "us": us,
        "eager_us": 3 * us,
        "kernel_us": us / 2,
        "roofline_us": 2.0,
        "copy_TB_per_s": 4.0,
        "matmul_TFLOP_per_s": 700.0,
        "TFLOP_per_s": 0.0,
        "gpu": "NVIDIA H200",
        "kernels": {"chunk_scan_kernel": [1, 3.0], "l2norm_kernel": [2, 1.0]},
    } | changes


def target(
    measure: str, required: float | None, stretch: float | None = None, baseline: str = ""
) -> Target:
    return Target("core", "small", measure, required, stretch, baseline)


@pytest.mark.parametrize(
    ("measure", "value"),
    [("ratio", 2.5), ("wall", 5.0), ("kernels", 2.5), ("roofline", 2.0), ("us", 4), ("share", 0.4)],
)
def test_a_target_compares_our_fastest_with_the_fastest_baseline(
    measure: str, value: float
) -> None:
    rows = [
        row("slow baseline", 40.0),
        row(BASELINE, 10.0),
        row(OURS, 8.0, eager_us=6.0),
        row(f"{OURS}, fused", 4.0),
    ]
    assert targets.value_of(target(measure, 1.0), rows) == value


def test_a_target_may_name_its_baseline() -> None:
    rows = [row(f"{BASELINE}, eager", 10.0), row(f"{BASELINE}, compiled", 20.0), row(OURS, 4.0)]
    assert targets.value_of(target("ratio", 1.0, baseline="compiled"), rows) == 5.0
    assert targets.value_of(target("ratio", 1.0, baseline="FLA eager"), rows) == 2.5
    assert targets.value_of(target("ratio", 1.0, baseline="FLA"), rows) == 2.5
    assert targets.value_of(target("ratio", 1.0, baseline="cuDNN"), rows) is None
    assert str(target("ratio", 1.0, baseline="FLA eager")) == "core small, against FLA eager"


def test_calls_that_took_turns_count_before_those_of_other_minutes() -> None:
    rows = [row(BASELINE, 10.0), row(OURS, 4.0, eager_us=6.0, in_turn=1.25)]
    assert targets.value_of(target("wall", 1.0), rows) == 1.25
    assert targets.value_of(target("ratio", 1.0), rows) == 2.5


def test_a_share_is_of_a_known_time_where_the_baseline_was_not_run() -> None:
    goal = Target("core", "small", "share", 1.0, 0.85, "cuDNN", 1296)
    alone = [row(BASELINE, 10.0), row(OURS, 1296 / 2)]
    assert targets.value_of(goal, alone) == 0.5
    assert targets.value_of(goal, [row("cuDNN frontend 1.32.0", 1296.0 / 4), *alone]) == 2.0
    assert targets.value_of(goal, alone[:1]) is None
    assert str(goal) == "core small, against cuDNN (1296 us where it was not run)"


def test_memory_is_our_most_against_the_least_of_a_baseline() -> None:
    """Rows whose memory is not known do not count."""
    goal = target("memory", 1.0, 0.8, "FLA")
    ours = [row(OURS, 1.0, peak_MB=300), row(f"{OURS}, compiled", 1.0, peak_MB=200)]
    graphs = row(f"{OURS}, CUDA graphs", 0.5)
    theirs = [row(f"{BASELINE}, {x}", 1.0, peak_MB=mb) for x, mb in (("eager", 400), ("c", 500))]
    assert targets.value_of(goal, [*theirs, *ours, graphs]) == 0.75
    assert targets.value_of(goal, [*theirs, graphs]) is None
    assert targets.value_of(goal, [row(BASELINE, 1.0), *ours]) is None


def test_errors_of_gradients_are_judged_one_by_one() -> None:
    errors = {BASELINE: (4.0, 6.0), OURS: (2.0, 5.0), f"{OURS}, fused": (1.0, 8.0), "cuDNN": (1, 1)}
    found = [
        {"gradient_accuracy": "softplus", "provider": name, "error_dq": q, "error_dA_log": rate}
        for name, (q, rate) in errors.items()
    ]
    rows = targets.rows_of({"benchmarks": [{"extra_info": x} for x in found]})
    goal = Target("gradient accuracy", "softplus", "error", 1.0, None, "FLA")
    assert targets.value_of(goal, rows) == 0.75


def test_training_is_judged_where_it_was_measured() -> None:
    prefill = [row(BASELINE, 10.0), row(OURS, 4.0)]
    trained = row(OURS, 4.0, stage="core training")
    assert targets.targets_for(prefill) == targets.TARGETS
    assert targets.targets_for([*prefill, trained]) == [*targets.TARGETS, *targets.TRAINING]
    assert "core training" not in targets.table(prefill)
    assert "core training" in targets.table([trained])


def test_accuracy_is_that_of_our_worst_provider() -> None:
    run = {
        "benchmarks": [
            {
                "extra_info": {
                    "accuracy": "softplus",
                    "provider": provider,
                    "error_o": o,
                    "error_S": S,
                }
            }
            for provider, o, S in (
                (BASELINE, 4.0, 6.0),
                (OURS, 2.0, 3.0),
                (f"{OURS}, fused", 1.0, 4.0),
            )
        ]
    }
    accuracy = Target("accuracy", "softplus", "error", 1.0)
    assert targets.value_of(accuracy, targets.rows_of(run)) == 1.5


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (target("ratio", 2.0, 3.0), "met"),
        (target("ratio", 2.0, 2.5), "reached"),
        (target("ratio", 2.6), "**missed**"),
        (target("us", 4.0, 3.0), "met"),
        (target("us", 3.9), "**missed**"),
        (target("us", None, 4.0), "reached"),
        (target("us", None, 3.9), "not reached"),
        (target("ratio", 1.0, baseline="compiled"), "not measured"),
        (target("memory", None, 1.0), "not measured"),
    ],
)
def test_a_target_is_met_or_missed(goal: Target, verdict: str) -> None:
    rows = [row(BASELINE, 10.0), row(OURS, 4.0)]
    assert targets.table(rows, [goal]).endswith(f"| {verdict} |")
    failed = verdict in ("**missed**", "not measured") and goal.required is not None
    assert bool(targets.missed(rows, [goal])) == failed


def test_every_target_has_its_benchmark() -> None:
    """A renamed case must not leave a target unmeasured."""
    from perf import (
        bench_core,
        bench_core_accuracy,
        bench_layer,
        bench_training,
        bench_training_accuracy,
    )
    from perf.harness.rows import operator_rows

    known = {("core", case.name) for case in bench_core.CASES}
    known |= {("accuracy", name) for name in bench_core_accuracy.CASES}
    known |= {("gradient accuracy", name) for name in bench_training_accuracy.CASES}
    known |= {(found.stage, found.case) for found in (*bench_layer.ROWS, *bench_training.ROWS)}
    for name in ("short_conv_qkv", "gate_cumsum", "rms_norm_gated", "kda_decode", "state_copy"):
        known |= {(found.stage, found.case) for found in operator_rows(name)}
    goals = [*targets.TARGETS, *targets.TRAINING]
    assert {(goal.stage, goal.case) for goal in goals} <= known
    assert {goal.measure for goal in goals} == set(targets.WORK)


def changed(old: dict[str, Any], new: dict[str, Any]) -> compare.Change:
    key = (new["stage"], new["case"], new["provider"])
    (change,) = compare.changes({key: old}, {key: new})
    return change


def test_a_row_is_compared_relative_to_its_run() -> None:
    slower = changed(row(OURS, 4.0), row(OURS, 4.4))
    assert slower.worse == pytest.approx(0.1)
    with_the_machine = changed(row(OURS, 4.0), row(OURS, 4.4, copy_TB_per_s=4.0 / 1.1))
    assert with_the_machine.worse == pytest.approx(0.0)


def test_gemm_speed_only_excuses_compute_bound_rows() -> None:
    slow_products = {"matmul_TFLOP_per_s": 630.0}
    assert changed(row(OURS, 4.0), row(OURS, 4.4, **slow_products)).worse == pytest.approx(0.1)
    bound = {"TFLOP_per_s": 315.0, "roofline_us": 2.2, **slow_products}
    old = row(OURS, 4.0, TFLOP_per_s=350.0)
    assert changed(old, row(OURS, 4.4, **bound)).worse == pytest.approx(-0.01)


def test_only_our_own_rows_are_compared() -> None:
    keys = {("core", "small", provider): row(provider, 4.0) for provider in (BASELINE, OURS)}
    assert [change.key[2] for change in compare.changes(keys, keys)] == [OURS]


@pytest.mark.parametrize(("us", "status", "said"), [(4.1, 0, "0 of 1"), (4.3, 1, "1 of 1")])
def test_five_percent_worse_fails(
    us: float, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, time in (("old", 4.0), ("new", us)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"benchmarks": [{"extra_info": row(OURS, time)}]}))
    assert compare.main([str(files[1]), "--against", str(files[0])]) == status
    assert f"{said} rows are more than 5 % worse" in capsys.readouterr().out


def test_no_new_run_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        mock.patch.object(compare, "choose_run", side_effect=FileNotFoundError("name one")),
        pytest.raises(SystemExit, match="2"),
    ):
        compare.main([])
    assert "name one" in capsys.readouterr().err


def test_a_gpu_has_a_folder() -> None:
    assert machine.folder_of("NVIDIA H200") == machine.HISTORY / "h200"
    assert machine.folder_of("NVIDIA H100 80GB HBM3") == machine.HISTORY / "h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "projections"),
        ("causal_conv1d_fwd_kernel", "convolution"),
        ("short_conv_qkv_kernel", "convolution"),
        ("chunk_gated_prepare_kernel", "chunks: prepare"),
        ("chunk_kda_fwd_kernel_intra_sub_chunk", "chunks: prepare"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunks: scan"),
        ("kda_gate_chunk_cumsum_vector_kernel", "gate"),
        ("triton_per_fused_l2norm_0", "norm of q and k"),
        ("layer_norm_gated_fwd_kernel", "output norm"),
        ("kda_decode_kernel", "decode step"),
        ("chunk_gradient_kernel", "chunks: gradient"),
        ("chunk_kda_bwd_kernel_wy_dqkg_fused", "chunks: gradient"),
        ("states_backward_kernel", "chunks: scan"),
        ("chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64", "chunks: scan"),
        ("backward_prepare_kernel", "chunks: prepare"),
        ("kda_gate_bwd_kernel", "gate"),
        ("short_conv_backward_kernel", "convolution"),
        ("Memset (Device)", "beta, fills, copies"),
    ],
)
def test_a_kernel_belongs_to_a_stage(kernel: str, stage: str) -> None:
    assert picture.stage_of(kernel) == stage


def test_stages_add_up_to_the_measured_time() -> None:
    assert picture.stacked(row(OURS, 8.0)) == {"chunks: scan": 6.0, "norm of q and k": 2.0}
    assert set(picture.COLOURS) == set(picture.STAGES)


def test_a_panel_has_the_baselines_and_our_fastest() -> None:
    rows = [row(BASELINE, 10.0), row(OURS, 8.0), row(f"{OURS}, fused", 4.0)]
    ((title, members),) = picture.panels(rows, [target("ratio", 1.0)] * 2)
    assert title == "core  small"
    assert [member["us"] for member in members] == [10.0, 4.0]
