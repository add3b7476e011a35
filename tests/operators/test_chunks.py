"""The chunk table of a variable-length batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_ops.varlen import EMPTY, prepare_chunk_indices
from tests.support.fake_cuda import cuda_code


def naive_table(lengths: list[int], total: int, chunk_size: int) -> list[list[int]]:
    rows = [[n, c] for n, length in enumerate(lengths) for c in range(-(-length // chunk_size))]
    return rows + [[EMPTY, EMPTY]] * (total // chunk_size + len(lengths) - len(rows))


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@given(
    lengths=st.lists(st.integers(0, 200), max_size=9),
    padding=st.integers(0, 130),
    chunk_size=st.sampled_from([16, 64, 100]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(deadline=None, max_examples=150)
def test_matches_the_definition(
    lengths: list[int], padding: int, chunk_size: int, dtype: torch.dtype
) -> None:
    total = sum(lengths) + padding
    table = prepare_chunk_indices(offsets(lengths, dtype), total, chunk_size)
    assert table.dtype == torch.int32
    assert table.tolist() == naive_table(lengths, total, chunk_size)


@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=9), padding=st.integers(0, 130))
@settings(deadline=None, max_examples=150)
def test_workspace_rows_are_distinct_and_in_bounds(lengths: list[int], padding: int) -> None:
    """Kernels keep chunk c of sequence n at workspace row `cu_seqlens[n] // C + n + c`."""
    total = sum(lengths) + padding
    starts = offsets(lengths).tolist()
    rows = [starts[n] // 64 + n + c for n, c in naive_table(lengths, total, 64) if n != EMPTY]
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < total // 64 + len(lengths) for row in rows)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_host_synchronization(dynamic: bool) -> None:
    cu_seqlens = offsets([100, 0, 64, 200])
    result, (source,) = cuda_code(
        lambda cu: prepare_chunk_indices(cu, 400), cu_seqlens, dynamic=dynamic
    )
    assert torch.equal(result, prepare_chunk_indices(cu_seqlens, 400))
    assert ".item()" not in source
    assert ".tolist()" not in source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 10), "cu_seqlens must have dtype int32, int64, got float32"),
        ((torch.zeros(3, 1, dtype=torch.int32), 10), r"cu_seqlens must have shape \[N \+ 1\]"),
        ((torch.zeros(0, dtype=torch.int32), 10), r"cu_seqlens must have shape \[N \+ 1\]"),
        ((torch.zeros(3, dtype=torch.int32), -1), "total_tokens must not be negative, got -1"),
        ((torch.zeros(3, dtype=torch.int32), 10, 0), "chunk_size must be at least 1, got 0"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_chunk_indices(*arguments)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_other_lengths() -> None:
    cu_seqlens = offsets([100, 0, 64, 200]).cuda()
    prepare_chunk_indices(cu_seqlens, 400)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = prepare_chunk_indices(cu_seqlens, 400)
    for lengths in ([100, 0, 64, 200], [1, 1, 1, 1], [0, 0, 0, 400], [0, 0, 0, 0]):
        cu_seqlens.copy_(offsets(lengths))
        graph.replay()
        assert table.tolist() == naive_table(lengths, 400, 64)
