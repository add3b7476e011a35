"""The arithmetic of the predictions for a mesh, against numbers computed by hand."""

import re
from pathlib import Path

import pytest

import kda_ops
from perf.analysis import mesh as model
from perf.analysis.mesh import Collective, Link, Mesh, all_gather, all_reduce
from perf.analysis.roofline import Gpu, Piece

FAST, SLOW = Link(400e9, 10e-6), Link(50e9, 30e-6)
GPU = Gpu("here", 4e12, 700e12, 100, 2e9, 400e9)
ROOT = Path(kda_ops.__file__).parent.parent


def mesh(tp: int, cp: int, fsdp: int) -> Mesh:
    return Mesh(tp, cp, fsdp, FAST, SLOW)


def test_a_collective_takes_its_latency_and_its_bytes() -> None:
    assert all_reduce(4, 400e6, FAST) == Collective(600e6, FAST)
    assert all_reduce(4, 400e6, FAST).seconds == pytest.approx(10e-6 + 1.5e-3)
    assert all_gather(8, 100e6, SLOW).bytes_sent == 700e6
    assert all_gather(8, 100e6, SLOW).seconds == pytest.approx(30e-6 + 14e-3)
    assert all_reduce(1, 400e6, FAST).seconds == all_gather(1, 100e6, FAST).seconds == 0.0


def test_a_dimension_that_leaves_the_host_has_the_network() -> None:
    """All ranks of a host together: 8, 4 and 1 of them at 50 GB/s, at most as within it."""
    of = mesh(1, 1, 1)
    assert of.link(1, 8) == of.link(2, 4) == FAST
    assert of.link(1, 16) == Link(400e9, 30e-6)
    assert of.link(2, 8) == Link(200e9, 30e-6)
    assert of.link(8, 2) == of.link(16, 4) == SLOW
    assert Mesh(1, 1, 1, Link(100e9, 1e-6), SLOW).link(1, 16) == Link(100e9, 30e-6)


def test_tensor_parallel_sums_the_output_and_the_gradient_of_the_input() -> None:
    forward, backward = model.tensor_parallel(mesh(4, 1, 1), 8192)
    assert forward == backward
    assert forward.bytes_sent == 1.5 * 37_748_736  # 8192 x 2304 in bf16
    assert forward.seconds == pytest.approx(10e-6 + 141.56e-6, rel=1e-4)


def test_context_parallel_gathers_states_and_three_rows() -> None:
    """A rank's [32, 128, 256] in fp32 are 4 MiB, backward half; three hidden rows 13,824 bytes."""
    maps, rows, gradients, drows = model.context_parallel(mesh(1, 8, 1))
    assert maps.bytes_sent == 7 * 4 * 2**20
    assert gradients.bytes_sent == 7 * 2 * 2**20
    assert rows == drows == Collective(7 * 13_824, FAST)
    maps, rows, *_ = model.context_parallel(mesh(2, 16, 1))
    assert maps == Collective(15 * 2 * 2**20, Link(200e9, 30e-6))
    assert rows == Collective(15 * 13_824, Link(200e9, 30e-6))
    assert all(x.seconds == 0 for x in model.context_parallel(mesh(8, 1, 8)))


def test_weights_are_gathered_twice_and_gradients_scattered_in_fp32() -> None:
    """Of 64 M weights, 4 ranks of tp have 16 M each, of which 8 shards have 2 M each."""
    first, second, scattered = model.shards(mesh(4, 2, 4), 64 * 10**6)
    assert first == second == Collective(7 * 4e6, Link(100e9, 30e-6))
    assert scattered.bytes_sent == 7 * 8e6


def test_compute_is_divided_by_the_ranks_and_context_adds_columns_and_two_gemms() -> None:
    """On the GPU that was measured, half of its tokens on a rank."""
    forward = [Piece("products", 0, 0, 1e-3, "flops"), Piece("scan", 0, 0, 2e-3, "chain")]
    gemms, recurrence, convolution, norm = (2 / 3 * 2454e-6, 1995e-6, 221e-6, 140e-6)
    backward = gemms + recurrence + convolution + norm

    def compute(*sizes: int) -> float:
        return model.layer(mesh(*sizes), GPU, GPU, forward, model.TOKENS).compute

    assert compute(1, 1, 1) == pytest.approx(3e-3 + backward)
    assert compute(1, 1, 2) == pytest.approx((3e-3 + backward) / 2)
    reads = 7 * 8192 * 4096 * 2 / 4e12  # seven times [T, 32, 128] in bf16
    assert compute(1, 2, 1) == pytest.approx((3e-3 + backward + 51e-6 + reads) / 2)
    assert compute(2, 1, 1) == pytest.approx(2e-3 + (1e-3 + backward) / 2)


def test_a_step_is_all_blocks_with_their_mlps_and_the_optimizer() -> None:
    sizes, tokens = mesh(2, 1, 4), 32_768
    forward = [Piece("products", 0, 0, 1e-3, "flops")]
    layer = model.layer(sizes, GPU, GPU, forward, tokens)
    step = model.step(sizes, GPU, GPU, forward, tokens)
    assert model.MLP_WEIGHTS == 3 * 2304 * 6144
    mlp = 6 * 8192 * 42_467_328 / 2 / 700e12
    adamw = 28 * (model.WEIGHTS + 42_467_328) / 8 / 4e12
    assert step.compute == pytest.approx(20 * (layer.compute + mlp + adamw))
    assert sum(x.bytes_sent for x in step.tp) == 20 * 4 * 37_748_736
    sent = 3 * (2 + 2 + 4) * (model.WEIGHTS + 42_467_328) / 8
    assert sum(x.bytes_sent for x in step.fsdp) == pytest.approx(20 * sent)
    collectives = sum(x.seconds for x in step.collectives)
    assert step.apart == pytest.approx(step.compute + collectives)
    assert step.overlapped == max(step.compute, collectives)


def test_one_gpu_is_predicted_as_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The table for one mesh, of the committed runs; the layer within a tenth."""
    assert model.main(["--tp=2", "--cp=4", "--tokens=65536"]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("| 8 |")]
    assert row.startswith("| 8 | tp 2 x cp 4 | ")
    assert "Predictions by `python -m perf.analysis.mesh`, not measurements: H200, 65,536" in out
    (found,) = re.findall(r"8,192 tokens: ([\d,]+) us by the model, ([\d,]+) measured", out)
    predicted, measured = (float(us.replace(",", "")) for us in found)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp=3"], "--tp must divide 32 heads, got 3"),
        (["--cp=0"], "ranks and tokens must be at least 1"),
        (["--gpu=TPU"], "invalid choice: 'TPU'"),
    ],
)
def test_wrong_meshes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        model.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_has_the_table_of_the_committed_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "several-gpus.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    assert model.main(["--page", str(copy)]) == 0
    assert copy.read_text() == page.read_text()
