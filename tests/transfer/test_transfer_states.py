"""The planner on models' states: unsharded tensors are sharded for both engines, the plan is
executed on the bytes of the pages, and the result equals the reader's own shards.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kda_ops.cache.spec import KDAStateSpec, Segment, mamba2_segments
from kda_ops.transfer.geometry import PageGeometry, packed_geometry, state_geometry
from kda_ops.transfer.pages import buffer_pages
from kda_ops.transfer.plan import plan_reads, source_ranks
from kda_ops.transfer.schema import GeometryError
from tests.support.transfer_fleet import TP_SIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Engine(NamedTuple):
    """Pages of an engine, and how a rank makes its page from the states of the whole layer."""

    geometry: PageGeometry
    page: Callable[[dict[str, Tensor], int], np.ndarray]


def shard(heads: Tensor, tp: int, rank: int) -> Tensor:
    """What a rank computes with: its share of the heads, or its copy of one."""
    if len(heads) >= tp:
        return heads.chunk(tp)[rank]
    return heads.repeat_interleave(tp // len(heads), dim=0)[rank : rank + 1]


def kda_engine(spec: KDAStateSpec) -> Engine:
    """KDA, and Gated DeltaNet, in pages of `allocate`."""

    def page(states: dict[str, Tensor], rank: int) -> np.ndarray:
        conv, recurrent = spec.allocate(1, layers=1)
        recurrent[0, 0].copy_(shard(states["recurrent"], spec.tp_size, rank))
        if conv is None:
            return buffer_pages(recurrent, spec.page_bytes)[0][0].numpy()
        channels = [shard(states[n], spec.tp_size, rank).flatten(0, 1) for n in ("q", "k", "v")]
        rows = torch.cat(channels)  # [D, L]
        conv[0, 0].copy_(rows if spec.layout == "DS" else rows.t())
        return buffer_pages(conv, spec.page_bytes)[0][0].numpy()

    return Engine(state_geometry(spec, pages=1, block_tokens=16), page)


def mamba2_engine(
    segments: tuple[Segment, ...], dtypes: dict[str, torch.dtype], rows: int, tp: int, padding: int
) -> Engine:
    """Mamba2 in pages without gaps: x, B, C, then the state."""

    def geometry(page_bytes: int | None) -> PageGeometry:
        return packed_geometry(
            list(segments),
            name="mamba",
            kind="state",
            dtypes={n: str(dtype).removeprefix("torch.") for n, dtype in dtypes.items()},
            tp_size=tp,
            pages=1,
            block_tokens=16,
            conv_size=4,
            num_spec=rows - 3,
            page_bytes=page_bytes,
        )

    def page(states: dict[str, Tensor], rank: int) -> np.ndarray:
        parts = [shard(states[s.name], tp, rank).contiguous().flatten() for s in segments]
        held = torch.cat([part.view(torch.uint8) for part in parts]).numpy()
        return np.pad(held, (0, padding))

    return Engine(geometry(geometry(None).page_bytes + padding), page)


def check(states: dict[str, Tensor], src: Engine, dst: Engine) -> None:
    """Every byte of every reader's page is right and is written once; padding never."""
    covered = {
        n: torch.full_like(x.view(torch.uint8), 255).view(x.dtype) for n, x in states.items()
    }
    sources = {rank: src.page(states, rank) for rank in range(src.geometry.tp_size)}
    for rank in range(dst.geometry.tp_size):
        expected = dst.page(states, rank)
        out, writes = np.zeros_like(expected), np.zeros(len(expected), int)
        for read in plan_reads(src.geometry, dst.geometry, rank):
            assert read.src_rank in source_ranks(src.geometry.tp_size, dst.geometry.tp_size, rank)
            to = slice(read.dst_offset, read.dst_offset + read.nbytes)
            out[to] = sources[read.src_rank][read.src_offset : read.src_offset + read.nbytes]
            writes[to] += 1
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(writes, dst.page(covered, rank) == 255)


def random_states(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> dict:
    """Random bits; in no byte all of them."""
    rng = np.random.default_rng(0)
    return {
        n: torch.from_numpy(
            rng.integers(0, 255, (*shape[:-1], shape[-1] * dtypes[n].itemsize), dtype=np.uint8)
        ).view(dtypes[n])
        for n, shape in shapes.items()
    }


def counts(p: int, d: int, most: int = 32) -> list[int]:
    """Numbers of heads that shard or replicate over both sizes."""
    return [
        n
        for n in range(1, most + 1)
        if all(n % tp == 0 if n >= tp else tp % n == 0 for tp in (p, d))
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kda_and_gated_deltanet(data: st.DataObject) -> None:
    draw = data.draw
    p, d = draw(st.sampled_from(TP_SIZES))
    heads = counts(p, d)
    HV = draw(st.sampled_from(heads))
    H = draw(st.sampled_from([n for n in heads if HV % n == 0]))
    K, V = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dtype, recurrent = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["auto", "bfloat16"]))
    num_spec, conv_size = draw(st.integers(0, 3)), draw(st.sampled_from([2, 3, 4, None]))
    layout = draw(st.sampled_from(["SD", "DS"])) if p == d else "DS"

    def engine(tp: int) -> Engine:
        def spec(page_bytes: int | None) -> KDAStateSpec:
            return KDAStateSpec(
                H,
                HV,
                K,
                V,
                conv_size=conv_size,
                num_spec=num_spec,
                conv_dtype=dtype,
                recurrent_dtype=recurrent,
                layout=layout,
                tp_size=tp,
                page_bytes=page_bytes,
            )

        return kda_engine(spec(spec(None).page_bytes + 4 * draw(st.integers(0, 200))))

    src, dst = engine(p), engine(d)
    shapes: dict[str, tuple[int, ...]] = {"recurrent": (HV, V, K)}
    dtypes = {"recurrent": torch.float32 if recurrent == "auto" else torch.bfloat16}
    if conv_size is not None:
        L = conv_size - 1 + num_spec
        shapes |= {"q": (H, K, L), "k": (H, K, L), "v": (HV, V, L)}
        dtypes |= {"q": dtype, "k": dtype, "v": dtype}
    check(random_states(shapes, dtypes), src, dst)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mamba2_with_any_number_of_groups(data: st.DataObject) -> None:
    draw = data.draw
    p, d = draw(st.sampled_from(TP_SIZES))
    numbers = counts(p, d)
    heads = draw(st.sampled_from(numbers))
    groups = draw(st.sampled_from([n for n in numbers if heads % n == 0]))
    width, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dtype, state_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    num_spec = draw(st.integers(0, 2))
    segments = mamba2_segments(
        heads, width, groups, size, num_spec=num_spec, conv_dtype=dtype, state_dtype=state_dtype
    )
    dtypes = {"x": dtype, "B": dtype, "C": dtype, "ssm": state_dtype}
    L = 3 + num_spec
    src, dst = (mamba2_engine(segments, dtypes, L, tp, draw(st.integers(0, 9))) for tp in (p, d))
    shapes = {
        "x": (heads, width, L),
        "B": (groups, size, L),
        "C": (groups, size, L),
        "ssm": (heads, width, size),
    }
    check(random_states(shapes, dtypes), src, dst)


def test_mamba2_by_hand() -> None:
    """One group on four ranks: every rank holds all of B and C, whose offsets do not scale."""
    segments = mamba2_segments(8, 4, 1, 16, conv_dtype=torch.bfloat16)
    assert segments == (
        Segment("x", 8, 4 * 3 * 2),
        Segment("B", 1, 16 * 3 * 2),
        Segment("C", 1, 16 * 3 * 2),
        Segment("ssm", 8, 4 * 16 * 4),
    )
    dtypes = dict.fromkeys(("x", "B", "C"), torch.bfloat16) | {"ssm": torch.float32}
    src, dst = (mamba2_engine(segments, dtypes, 3, tp, 0).geometry for tp in (2, 4))
    assert [tuple(r) for r in plan_reads(src, dst, 3)] == [
        (1, "x", 48, 0, 48),
        (1, "B", 96, 48, 96),
        (1, "C", 192, 144, 96),
        (1, "ssm", 288 + 512, 240, 512),
    ]


@pytest.mark.parametrize(
    ("segment", "match"),
    [
        (Segment("B", 0, 8), "group g: segment B: units must be at least 1, got 0"),
        (Segment("B", 3, 8), "group g: segment B: tp_size must divide 3 heads, got 2"),
        (Segment("C", 1, 8), r"group g: dtypes must name segment C, got \['B'\]"),
    ],
)
def test_segments_that_cannot_be_packed(segment: Segment, match: str) -> None:
    with pytest.raises(GeometryError, match=match):
        packed_geometry(
            [segment],
            name="g",
            kind="state",
            dtypes={"B": "bfloat16"},
            tp_size=2,
            pages=1,
            block_tokens=16,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 3}, "num_heads must be a multiple of n_groups = 3, got 8"),
        ({"state_size": 0}, "state_size must be at least 1, got 0"),
        ({"conv_size": 1}, "conv_size must be at least 2, got 1"),
        ({"num_spec": -1}, "num_spec must be at least 0, got -1"),
    ],
)
def test_mamba2_errors(change: dict[str, int], message: str) -> None:
    given = {"num_heads": 8, "head_dim": 4, "n_groups": 1, "state_size": 16} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        mamba2_segments(**given, conv_dtype=torch.bfloat16)
