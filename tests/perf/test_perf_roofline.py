"""The predictions' arithmetic."""

from pathlib import Path

import pytest

from perf.analysis import roofline
from perf.analysis.pages import write_between
from perf.analysis.report import newest
from perf.analysis.roofline import Gpu, Piece
from perf.harness import machine
from perf.harness.runs import read_run

HERE = Gpu("here", 4e12, 700e12, 100, 2e9, 400e9)
THERE = Gpu("there", 2e12, 350e12, 50, 1e9, 200e9)


@pytest.mark.parametrize(
    ("limit", "one", "four"),
    [
        ("bytes", 20e-6, 5e-6),
        ("flops", 20e-6, 5e-6),
        ("work", 40e-6, 10e-6),
        ("chain", 20e-6, 20e-6),
    ],
)
def test_each_bottleneck_scales_in_its_own_way(limit: str, one: float, four: float) -> None:
    piece = Piece("kernel", 0, 0, 10e-6, limit)
    assert piece.predicted(HERE, HERE, 1) == pytest.approx(10e-6)
    assert piece.predicted(THERE, HERE, 1) == pytest.approx(one)
    assert piece.predicted(THERE, HERE, 4) == pytest.approx(four)


def test_a_chain_gets_shorter_from_some_number_of_ranks() -> None:
    piece = Piece("kernel", 0, 0, 10e-6, "chain", shorter=(4, 3e-6))
    assert piece.predicted(THERE, HERE, 2) == pytest.approx(20e-6)
    assert piece.predicted(THERE, HERE, 4) == pytest.approx(6e-6)


def test_nothing_is_predicted_below_its_roofline() -> None:
    by_bytes = Piece("kernel", 400_000_000, 0, 1e-6, "chain")
    assert by_bytes.roofline(THERE, 1) == pytest.approx(200e-6)
    assert by_bytes.predicted(THERE, HERE, 2) == pytest.approx(100e-6)
    by_flops = Piece("kernel", 4, 700_000_000_000, 1e-6, "work")
    assert by_flops.roofline(THERE, 1) == pytest.approx(2e-3)


def test_ranks_add_up_their_outputs() -> None:
    assert roofline.all_reduce(HERE, 8192, 1) == 0.0
    two, eight = (roofline.all_reduce(HERE, 8192, ranks) for ranks in (2, 8))
    moved = 8192 * roofline.HIDDEN * 2 / HERE.link_bytes_per_second
    assert two == pytest.approx(roofline.ALL_REDUCE_SECONDS + moved)
    assert eight == pytest.approx(roofline.ALL_REDUCE_SECONDS + 1.75 * moved)


def test_other_gpus_reach_the_same_share_of_their_data_sheets() -> None:
    row = {"copy_TB_per_s": 4.8 * 0.9, "matmul_TFLOP_per_s": 989 * 0.7}
    found = {gpu.name: gpu for gpu in roofline.gpus([row])}
    assert found["A100 80GB"].bytes_per_second == pytest.approx(2.039e12 * 0.9)
    assert found["B200"].flops_per_second == pytest.approx(2250e12 * 0.7)


def committed() -> list[roofline.Row]:
    return newest(read_run(path) for path in (machine.HISTORY / "h200").glob("*.json"))


def test_the_model_reproduces_the_measured_layer() -> None:
    """From its parts on the GPU they were measured on, possibly in different runs."""
    rows = committed()
    measured = next(gpu for gpu in roofline.gpus(rows) if gpu.name == roofline.MEASURED)
    pieces = roofline.prefill_pieces(rows)
    model = roofline.layer_seconds(pieces, measured, measured, 1, roofline.TOKENS)
    layer = roofline.best(rows, "layer", f"prefill-T{roofline.TOKENS}-H32")
    assert model * 1e6 == pytest.approx(layer["us"], rel=0.2)


def test_a_missing_row_is_named() -> None:
    with pytest.raises(ValueError, match="rows must hold core nothing, got none"):
        roofline.best(committed(), "core", "nothing")


def test_the_notes_get_the_tables_between_their_markers(tmp_path: Path) -> None:
    notes = tmp_path / "NOTES.md"
    notes.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    assert roofline.main(["--notes", str(notes)]) == 0
    text = notes.read_text()
    assert text.startswith(f"before\n{roofline.BEGIN}\nPredictions")
    assert text.endswith(f"measured.\n{roofline.END}\nafter\n")
    assert "old" not in text
    assert all(f"| decode, batch 1 | {ranks} |" in text for ranks in roofline.RANKS)
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(ValueError, match="must hold <!-- roofline:begin -->"):
        write_between(tmp_path / "bare.md", roofline.BEGIN, text, roofline.END)
