"""The chunk-local cumulative sum: definition, sequences, padding, gradients, errors."""

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.varlen import prepare_chunk_indices
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close

LENGTHS = (100, 0, 1, 64, 33)


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def one_sequence(g: Tensor, chunk_size: int, scale: float) -> Tensor:
    """Token by token: `g [T, ...]`."""
    out = torch.zeros_like(g)
    for t in range(g.shape[0]):
        before = out[t - 1] if t % chunk_size else torch.zeros_like(g[0])
        out[t] = before + g[t]
    return out * scale


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_definition(chunk_size: int) -> None:
    g = torch.randn(2, 150, 3, dtype=torch.float64)
    expected = torch.stack([one_sequence(entry, chunk_size, 0.5) for entry in g])
    out = kda_ops.chunk_cumsum(g, chunk_size=chunk_size, scale=0.5)
    assert_close(out, expected, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("table", [True, False])
def test_sequences_are_separate(dtype: torch.dtype, table: bool) -> None:
    T = sum(LENGTHS)
    g, cu_seqlens = torch.randn(1, T, 3, dtype=torch.float64), offsets(LENGTHS, dtype)
    expected = torch.cat([one_sequence(part, 64, 1.0) for part in g[0].split(LENGTHS)])
    chunk_indices = prepare_chunk_indices(cu_seqlens, T) if table else None
    out = kda_ops.chunk_cumsum(g, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
    assert_close(out, expected[None], expected[None])


def test_whole_chunks_can_be_split() -> None:
    g = torch.randn(1, 192, 5)
    whole = kda_ops.chunk_cumsum(g)
    parts = [kda_ops.chunk_cumsum(part) for part in g.split(64, dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def with_padding() -> dict:
    g = torch.randn(1, 300, 3)
    g[:, sum(LENGTHS) :] = torch.nan
    return {"g": g, "cu_seqlens": offsets(LENGTHS)}


def assert_padding_is_zero(out: Tensor) -> None:
    inputs = with_padding()
    real = sum(LENGTHS)
    assert out.shape == inputs["g"].shape
    assert out[:, :real].isfinite().all()
    assert torch.equal(out[:, real:], torch.zeros_like(out[:, real:]))


def test_padding() -> None:
    assert_padding_is_zero(kda_ops.chunk_cumsum(**with_padding()))


@pytest.mark.interpreter
def test_padding_of_the_kernel() -> None:
    assert_padding_is_zero(run_kernels(kda_ops.chunk_cumsum)(**with_padding()))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "cu_seqlens", [[0, -7, 1000], [-100, 50, 20], [2**31 - 1, -(2**31), 5], [90, 10, 60]]
)
@pytest.mark.parametrize("row", [[0, 5], [7, 0], [-3, 2], [1, -1], [0, 2**31 - 1]])
def test_kernel_stays_in_bounds_for_any_tables(cu_seqlens: list[int], row: list[int]) -> None:
    T = 90
    memory = torch.full((3, T, 4), torch.nan)
    memory[1] = 1
    tables = (torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor([row] * (T // 64 + 2)))
    inputs = (memory[1:2], 64, 1.0, tables[0], tables[1].to(torch.int32))
    from kda_ops.gating.chunk_cumsum.kernel import launch_chunk_cumsum

    out = launch_chunk_cumsum(*inputs)
    assert out.shape == (1, T, 4)
    assert memory[1].eq(1).all()
    assert memory[[0, 2]].isnan().all()


def test_gradients() -> None:
    g = torch.randn(2, 40, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: kda_ops.chunk_cumsum(g, chunk_size=16, scale=0.7), g)
    g = torch.randn(1, 40, 2, dtype=torch.float64, requires_grad=True)
    cu_seqlens = offsets((17, 0, 5))
    varlen = lambda g: kda_ops.chunk_cumsum(g, chunk_size=16, cu_seqlens=cu_seqlens)  # noqa: E731
    assert torch.autograd.gradcheck(varlen, g)


G = torch.zeros(1, 100, 4)
CU = offsets((40, 60))


@pytest.mark.parametrize(
    ("g", "options", "message"),
    [
        (G.int(), {}, r"g must have dtype .*, got int32"),
        (G[0, 0], {}, r"g must have shape \[B, T, \.\.\.\], got \(4,\)"),
        (G, {"chunk_size": 48}, r"chunk_size must be a power of two from 16 to 256, got 48"),
        (G, {"chunk_size": 512}, r"chunk_size must be a power of two from 16 to 256, got 512"),
        (
            G,
            {"chunk_indices": prepare_chunk_indices(CU, 100)},
            r"chunk_indices must come with cu_seqlens",
        ),
        (G.expand(2, -1, -1), {"cu_seqlens": CU}, r"g must have batch size 1 .*, got 2"),
        (G, {"cu_seqlens": CU.float()}, r"cu_seqlens must have dtype .*, got float32"),
        (G, {"cu_seqlens": CU[None]}, r"cu_seqlens must have shape \[N \+ 1\], got \(1, 3\)"),
        (
            G,
            {"cu_seqlens": CU, "chunk_indices": prepare_chunk_indices(CU, 200)},
            r"chunk_indices must have shape \[3, 2\]",
        ),
        (G, {"cu_seqlens": CU + 1}, r"cu_seqlens must start at 0, got 1"),
        (G, {"cu_seqlens": offsets((60, -20))}, r"cu_seqlens must not decrease, got 60 then 40"),
        (G, {"cu_seqlens": offsets((60, 41))}, r"cu_seqlens must end at or before 100 .*, got 101"),
        (
            G,
            {"cu_seqlens": CU, "chunk_indices": prepare_chunk_indices(offsets((70, 30)), 100)},
            r"chunk_indices must be the chunk table of cu_seqlens, expected row 1 to be \[1, 0\]",
        ),
    ],
)
def test_errors(g: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kda_ops.chunk_cumsum(g, **options)
