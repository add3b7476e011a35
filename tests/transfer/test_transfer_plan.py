"""The tensor-parallel planner on bytes, and the geometry that two engines exchange."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_ops.cache.spec import KDAStateSpec, Segment
from kda_ops.transfer.geometry import (
    EngineGeometry,
    PageGeometry,
    PlacedSegment,
    check_compatible,
    packed_geometry,
    state_geometry,
)
from kda_ops.transfer.messages import decode_geometry, encode_geometry
from kda_ops.transfer.plan import (
    Read,
    consumer_ranks,
    plan_granules,
    plan_reads,
    plan_zero,
    source_ranks,
)
from kda_ops.transfer.schema import GeometryError, decode_json
from tests.support.transfer_fleet import TP_SIZES, shard

CANARY = 0xEE


def shardable(units: int, *sizes: int) -> bool:
    return all(units % tp == 0 if units >= tp else tp % units == 0 for tp in sizes)


def place(
    segments: list[tuple[str, int, int]], gaps: list[int], tp: int, **fields: Any
) -> PageGeometry:
    """A page geometry with a gap before every segment and one after the last."""
    placed, end = [], 0
    state = fields.get("kind") != "attention"
    for (name, units, nbytes), gap in zip(segments, gaps, strict=False):
        placed.append(PlacedSegment(name, units, nbytes, "uint8", end + gap))
        end += gap + max(units // tp, 1) * nbytes
    given = {
        "name": "g",
        "kind": "state",
        "layout": "DS",
        "conv_size": 3 if state else 0,
        "num_spec": 1 if state else 0,
        "block_tokens": 16,
        "pages_per_block": 1,
        "page_bytes": end + gaps[-1],
        "pages": 1,
        "layers": 1,
    }
    return PageGeometry(segments=tuple(placed), tp_size=tp, **(given | fields))


def page(geometry: PageGeometry, content: dict[str, np.ndarray], rank: int) -> np.ndarray:
    """The page of a rank, cut directly from the global content `[units, bytes]`."""
    out = np.full(geometry.page_bytes, CANARY, np.uint8)
    for segment in geometry.segments:
        held = shard(content[segment.name], geometry.tp_size, rank).ravel()
        out[segment.offset : segment.offset + len(held)] = held
    return out


def execute(
    reads: list[Read], sources: dict[int, np.ndarray], nbytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The page that reads fill, and how often each of its bytes was written."""
    out, writes = np.full(nbytes, CANARY, np.uint8), np.zeros(nbytes, int)
    for read in reads:
        source = sources[read.src_rank][read.src_offset : read.src_offset + read.nbytes]
        out[read.dst_offset : read.dst_offset + read.nbytes] = source
        writes[read.dst_offset : read.dst_offset + read.nbytes] += 1
    return out, writes


def content_of(geometry: PageGeometry, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bytes without the canary's value."""
    rng = np.random.default_rng(seed)
    return {
        s.name: rng.integers(0, CANARY, (s.units, s.bytes_per_unit), dtype=np.uint8)
        for s in geometry.segments
    }


def check_reads(src: PageGeometry, dst: PageGeometry) -> None:
    """Every rank's plan makes its own page, each byte once, and stays within its sources."""
    content = content_of(src)
    sources = {rank: page(src, content, rank) for rank in range(src.tp_size)}
    for rank in range(dst.tp_size):
        reads = plan_reads(src, dst, rank)
        expected = page(dst, content, rank)
        out, writes = execute(reads, sources, dst.page_bytes)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(writes, expected != CANARY)
        assert {read.src_rank for read in reads} <= set(
            source_ranks(src.tp_size, dst.tp_size, rank)
        )


@st.composite
def geometries(draw: st.DrawFn) -> tuple[PageGeometry, PageGeometry]:
    p, d = draw(st.sampled_from(TP_SIZES))
    counts = st.sampled_from([n for n in range(1, 65) if shardable(n, p, d)])
    segments = [
        (f"s{i}", draw(counts), draw(st.integers(1, 9))) for i in range(draw(st.integers(1, 5)))
    ]
    gaps = st.lists(st.integers(0, 7), min_size=len(segments) + 1, max_size=len(segments) + 1)
    return place(segments, draw(gaps), p), place(segments, draw(gaps), d)


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_plan_makes_the_page_a_rank_would_have_computed(
    pair: tuple[PageGeometry, PageGeometry],
) -> None:
    check_reads(*pair)


@pytest.mark.parametrize(("p", "d"), [(1, 2), (4, 2), (8, 8), (2, 16), (16, 1)])
@pytest.mark.parametrize("heads", [(16, 16, 128, 128), (4, 16, 64, 128), (2, 8, 96, 32)], ids=str)
def test_kda_states_with_grouped_values_and_replicated_keys(
    p: int, d: int, heads: tuple[int, ...]
) -> None:
    def geometry(tp: int, page_bytes: int | None) -> PageGeometry:
        spec = KDAStateSpec(
            *heads,
            num_spec=1,
            conv_dtype=torch.bfloat16,
            layout="DS",
            tp_size=tp,
            page_bytes=page_bytes,
        )
        return state_geometry(spec, pages=2, block_tokens=16)

    check_reads(geometry(p, None), geometry(d, 4 << 20))


def test_three_reads_and_one_state_per_source_when_nothing_is_replicated() -> None:
    def geometry(tp: int) -> PageGeometry:
        spec = KDAStateSpec(8, 16, 64, 64, conv_dtype=torch.bfloat16, layout="DS", tp_size=tp)
        return state_geometry(spec, pages=1, block_tokens=16)

    names = ["q", "k", "v", "recurrent"]
    assert [r.segment for r in plan_reads(geometry(1), geometry(4), 3)] == names
    assert [r.segment for r in plan_reads(geometry(4), geometry(4), 3)] == names
    reads = plan_reads(geometry(4), geometry(2), 1)
    assert sorted((r.src_rank, names.index(r.segment)) for r in reads) == [
        (rank, i) for rank in (2, 3) for i in range(4)
    ]


def test_a_replicated_segment_keeps_its_own_offset() -> None:
    """Two KV heads on four ranks, read by eight: nothing scales with the ratio of sizes."""
    segments = [("q", 16, 4), ("kv", 2, 8)]
    src, dst = place(segments, [0, 0, 0], 4), place(segments, [0, 0, 0], 8)
    reads = plan_reads(src, dst, 7)
    assert reads == [Read(3, "q", 8, 0, 8), Read(3, "kv", 16, 8, 8)]


def test_the_first_source_that_holds_a_unit_provides_it() -> None:
    segments = [("kv", 2, 8)]
    reads = plan_reads(place(segments, [0, 0], 8), place(segments, [0, 0], 1), 0)
    assert [(r.src_rank, r.dst_offset) for r in reads] == [(0, 0), (4, 8)]


def test_row_interleaved_states_are_read_whole() -> None:
    spec = KDAStateSpec(2, 4, 8, 8, conv_dtype=torch.bfloat16, layout="SD", tp_size=2)
    geometry = state_geometry(spec, pages=1, block_tokens=16)
    covered = np.zeros(spec.page_bytes, int)
    for read in plan_reads(geometry, geometry, 1):
        assert (read.src_rank, read.src_offset) == (1, read.dst_offset)
        covered[read.dst_offset : read.dst_offset + read.nbytes] += 1
    conv = spec.conv_length * spec.conv_dim * 2
    assert (covered[:conv] == 1).all()
    assert covered.sum() == conv + spec.local_bytes("recurrent")


@pytest.mark.parametrize(("p", "d"), TP_SIZES)
def test_source_and_consumer_ranks_are_inverse(p: int, d: int) -> None:
    pairs = {(s, r) for r in range(d) for s in source_ranks(p, d, r)}
    assert pairs == {(s, r) for s in range(p) for r in consumer_ranks(p, d, s)}
    assert {s for s, _ in pairs} == set(range(p))
    assert len(pairs) == max(p, d)
    if d >= p:
        assert pairs == {(r * p // d, r) for r in range(d)}


@pytest.mark.parametrize(("src_tokens", "dst_tokens"), [(4, 8), (8, 4), (6, 4), (4, 4)])
def test_granules_make_pages_of_another_size(src_tokens: int, dst_tokens: int) -> None:
    """24 tokens of 4 heads on two ranks, into pages of another number of tokens on four."""
    tokens, heads, width = 24, 4, 3
    rng = np.random.default_rng(0)
    content = {n: rng.integers(0, CANARY, (heads, tokens, width), dtype=np.uint8) for n in "kv"}

    def geometry(tp: int, page_tokens: int) -> PageGeometry:
        segments = [(n, heads, page_tokens * width) for n in "kv"]
        kind = {"kind": "attention", "block_tokens": page_tokens}
        return place(segments, [1, 2, 3], tp, **kind)

    def pages(g: PageGeometry, rank: int) -> list[np.ndarray]:
        n = g.page_tokens
        return [
            page(
                g,
                {k: c[:, t : t + n].reshape(heads, n * width) for k, c in content.items()},
                rank,
            )
            for t in range(0, tokens, n)
        ]

    src, dst = geometry(2, src_tokens), geometry(4, dst_tokens)
    sources = {rank: np.stack(pages(src, rank)) for rank in range(2)}
    for rank in range(4):
        plan = plan_granules(src, dst, rank)
        out = np.full((tokens // dst_tokens, dst.page_bytes), CANARY, np.uint8)
        for granule in range(len(out) * plan.dst_per_page):
            to, to_part = divmod(granule, plan.dst_per_page)
            source, source_part = divmod(granule, plan.src_per_page)
            for read, step in zip(plan.reads, plan.steps, strict=True):
                a = read.src_offset + source_part * step
                b = read.dst_offset + to_part * step
                row = sources[read.src_rank][source]
                out[to, b : b + read.nbytes] = row[a : a + read.nbytes]
        np.testing.assert_array_equal(out, np.stack(pages(dst, rank)))


def test_page_sizes_with_a_small_common_divisor_are_rejected() -> None:
    """A peer's page size is untrusted: it must not cause a list of 2**30 ranges here."""

    def geometry(page_tokens: int) -> PageGeometry:
        kind = {"kind": "attention", "block_tokens": page_tokens}
        return place([("k", 1, page_tokens)], [0, 0], 1, **kind)

    assert plan_granules(geometry(4096 * 3), geometry(3), 0).src_per_page == 4096
    for src, dst in ((4097, 1), (1, 4097), (1 << 30, 3)):
        with pytest.raises(GeometryError, match=f"common divisor, got {dst} and {src}"):
            plan_granules(geometry(src), geometry(dst), 0)


def test_zeroing_names_the_tail_of_every_head() -> None:
    segments = [("k", 4, 24), ("v", 4, 16)]
    geometry = place(segments, [1, 2, 3], 2, kind="attention", block_tokens=8)
    assert plan_zero(geometry, 6, 8) == [(19, 6), (43, 6), (63, 4), (79, 4)]
    assert plan_zero(geometry, 3, 3) == []
    with pytest.raises(GeometryError, match=r"tokens must be in \[0, 8\]"):
        plan_zero(geometry, 6, 9)
    with pytest.raises(GeometryError, match="kind must be attention, got state"):
        plan_zero(place(segments, [1, 2, 3], 2), 0, 1)


def hybrid(tp: int = 2, **changes: Any) -> EngineGeometry:
    """A state group and an attention group; `changes` are fields of the group they name first."""
    state, kv = [("q", 12, 6), ("recurrent", 12, 8)], [("k", 12, 32)]
    groups = {
        "kda": place(state, [0, 0, 4096], tp, name="kda", pages=8),
        "kv": place(kv, [0, 0], tp, name="kv", kind="attention", pages=8),
    }
    for key, value in changes.items():
        group, _, field = key.partition("_")
        groups[group] = dataclasses.replace(groups[group], **{field: value})
    return EngineGeometry(tuple(groups.values()))


def segment(**changes: Any) -> tuple[PlacedSegment, PlacedSegment]:
    given = {"name": "q", "units": 12, "bytes_per_unit": 6, "dtype": "uint8", "offset": 0}
    return (
        PlacedSegment(**(given | changes)),
        PlacedSegment("recurrent", 12, 8, "uint8", 1 << 10),
    )


@pytest.mark.parametrize(
    ("remote", "match"),
    [
        (lambda: EngineGeometry(hybrid().groups[:1]), r"number of groups .* got 2 and 1"),
        (lambda: hybrid(3), r"tp_size .* must divide .* got 2 and 3"),
        (lambda: hybrid(kda_name="mamba"), r"name of a group .* 'kda' and 'mamba'"),
        (lambda: hybrid(kv_kind="state"), r"kind .* 'attention' and 'state'"),
        (lambda: hybrid(kda_layout="SD"), r"layout .* 'DS' and 'SD'"),
        (lambda: hybrid(kda_conv_size=4), r"kda: conv_size .* got 3 and 4"),
        (lambda: hybrid(kda_num_spec=0), r"kda: num_spec .* got 1 and 0"),
        (lambda: hybrid(kda_layers=2), r"layers .* got 1 and 2"),
        (lambda: hybrid(kda_segments=segment()[:1]), r"number of segments .* got 2 and 1"),
        (lambda: hybrid(kda_segments=segment(name="x")), r"name of a segment .* 'q' and 'x'"),
        (lambda: hybrid(kda_segments=segment(units=8)), r"units of segment q .* got 12 and 8"),
        (lambda: hybrid(kda_segments=segment(bytes_per_unit=7)), r"bytes_per_unit .* got 6 and 7"),
        (lambda: hybrid(kda_segments=segment(dtype="int8")), r"dtype .* 'uint8' and 'int8'"),
        (
            lambda: hybrid(kda_segments=segment(shape=(2,))),
            r"shape of segment q .* got \(\) and \(2",
        ),
        (lambda: hybrid(kv_block_tokens=8), r"per token and unit of segment k .* got 2 and 4"),
    ],
)
def test_mismatches_name_the_field_and_both_values(
    remote: Callable[[], EngineGeometry], match: str
) -> None:
    check_compatible(hybrid(), hybrid(4))
    with pytest.raises(GeometryError, match=match):
        check_compatible(hybrid(), remote())


def kda(**changes: Any) -> PageGeometry:
    """States with everything different: heads, sizes and dtypes."""
    sizes = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 12}
    rest = {"conv_size": 4, "num_spec": 1, "conv_dtype": torch.bfloat16, "layout": "DS"}
    spec = KDAStateSpec(**(sizes | rest | changes))
    return state_geometry(spec, pages=2, block_tokens=16)


def recurrent_only(V: int, K: int) -> PageGeometry:
    """A state without a convolution."""
    return packed_geometry(
        [Segment("recurrent", 4, V * K * 4)],
        name="kda",
        kind="state",
        dtypes={"recurrent": "float32"},
        tp_size=1,
        pages=2,
        block_tokens=16,
        shapes={"recurrent": (V, K)},
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_k_heads": 4}, r"units of segment q .* got 2 and 4"),
        ({"num_v_heads": 8}, r"units of segment v .* got 4 and 8"),
        ({"head_k_dim": 16}, r"shape of segment q .* got \(8,\) and \(16,\)"),
        ({"head_v_dim": 8}, r"shape of segment v .* got \(12,\) and \(8,\)"),
        ({"conv_size": 3}, r"conv_size .* got 4 and 3"),
        ({"num_spec": 2}, r"num_spec .* got 1 and 2"),
        ({"conv_dtype": torch.float16}, r"dtype of segment q .* got 'bfloat16' and 'float16'"),
        (
            {"recurrent_dtype": "bfloat16"},
            r"dtype of segment recurrent .* got 'float32' and 'bfloat16'",
        ),
        ({"layout": "SD"}, r"layout .* got 'DS' and 'SD'"),
    ],
    ids=str,
)
def test_every_field_of_a_spec_is_compared_by_itself(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(GeometryError, match=match):
        check_compatible(EngineGeometry((kda(),)), EngineGeometry((kda(**changes),)))


def test_no_field_of_a_spec_is_left_out() -> None:
    """Fields that may differ: a plan accounts for them."""
    check_compatible(EngineGeometry((kda(),)), EngineGeometry((kda(tp_size=2, page_bytes=8192),)))
    (compared,) = [
        mark.args[1]
        for mark in test_every_field_of_a_spec_is_compared_by_itself.pytestmark
        if mark.name == "parametrize"
    ]
    names = {name for changes, _ in compared for name in changes} | {"tp_size", "page_bytes"}
    assert names == {field.name for field in dataclasses.fields(KDAStateSpec)}


@pytest.mark.parametrize(
    ("ours", "theirs", "match"),
    [
        # as many rows, as many bytes: other widths, other dtypes, another shape
        (
            kda(conv_size=4, num_spec=0),
            kda(conv_size=2, num_spec=2),
            r"conv_size .* got 4 and 2",
        ),
        (
            kda(conv_size=3, conv_dtype=torch.float32),
            kda(conv_size=6, conv_dtype=torch.bfloat16),
            r"conv_size .* got 3 and 6",
        ),
        (
            kda(head_k_dim=8, num_spec=0),
            kda(head_k_dim=6, num_spec=1),
            r"num_spec .* got 0 and 1",
        ),
        (
            kda(head_k_dim=8, conv_dtype=torch.bfloat16),
            kda(head_k_dim=4, conv_dtype=torch.float32),
            r"dtype of segment q .* got 'bfloat16' and 'float32'",
        ),
        (
            kda(num_k_heads=2, head_k_dim=8),
            kda(num_k_heads=4, head_k_dim=4),
            r"units of segment q .* got 2 and 4",
        ),
        (
            recurrent_only(8, 16),
            recurrent_only(16, 8),
            r"shape of segment recurrent .* got \(8, 16\) and \(16, 8\)",
        ),
    ],
)
def test_equal_totals_of_different_parts_are_rejected(
    ours: PageGeometry, theirs: PageGeometry, match: str
) -> None:
    with pytest.raises(GeometryError, match=match):
        check_compatible(EngineGeometry((ours,)), EngineGeometry((theirs,)))


def segments(geometry: PageGeometry, **changes: Any) -> PageGeometry:
    """The geometry with fields of its last segment replaced."""
    *rest, last = geometry.segments
    return dataclasses.replace(geometry, segments=(*rest, dataclasses.replace(last, **changes)))


def test_every_field_of_a_geometry_is_compared_or_taken_into_account() -> None:
    """Of two geometries that differ in one field, the field is named, or pages come over right."""
    state, kv = hybrid(1, kv_block_tokens=4).groups
    free = {
        "offset": segments(state, offset=100),
        "tp_size": hybrid(4).groups[0],
        "block_tokens": dataclasses.replace(state, block_tokens=32),
        "pages_per_block": dataclasses.replace(kv, pages_per_block=2, block_tokens=8),
        "page_bytes": dataclasses.replace(state, page_bytes=state.page_bytes + 8),
        "pages": dataclasses.replace(state, pages=9),
    }
    compared = {
        "name": dataclasses.replace(state, name="mamba"),
        "kind": dataclasses.replace(
            state, kind="attention", conv_size=0, num_spec=0, block_tokens=2
        ),
        "segments": dataclasses.replace(state, segments=state.segments[:1]),
        "layout": dataclasses.replace(state, layout="SD"),
        "conv_size": dataclasses.replace(state, conv_size=4),
        "num_spec": dataclasses.replace(state, num_spec=2),
        "layers": dataclasses.replace(state, layers=2),
        "name of a segment": segments(state, name="x"),
        "units": segments(state, units=8),
        "bytes_per_unit": segments(state, bytes_per_unit=4),
        "dtype": segments(state, dtype="int8"),
        "shape": segments(state, shape=(2,)),
    }
    fields = {*dataclasses.fields(PageGeometry), *dataclasses.fields(PlacedSegment)}
    assert free.keys() | compared.keys() == {f.name for f in fields} | {"name of a segment"}
    for theirs in free.values():
        ours = state if theirs.kind == "state" else kv
        check_reads(theirs, ours)
        check_reads(ours, theirs)
    for name, theirs in compared.items():
        with pytest.raises(GeometryError, match=rf"{name}.* must be the same .* got .* and "):
            check_compatible(EngineGeometry((state,)), EngineGeometry((theirs,)))


def test_row_interleaved_states_need_equal_tp() -> None:
    with pytest.raises(GeometryError, match=r"tp_size in layout SD .* got 2 and 4"):
        check_compatible(hybrid(2, kda_layout="SD"), hybrid(4, kda_layout="SD"))
    check_compatible(hybrid(2, kda_layout="SD"), hybrid(2, kda_layout="SD"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kda_kind": "ring"}, "kind must be state or attention, got 'ring'"),
        ({"kda_layout": "XY"}, "layout must be SD or DS, got 'XY'"),
        ({"kv_layout": "SD"}, "layout of attention pages must be DS"),
        ({"kv_conv_size": 4}, "conv_size of attention pages must be 0, got 4"),
        ({"kv_num_spec": 1}, "num_spec of attention pages must be 0, got 1"),
        ({"kda_conv_size": 1}, "conv_size must be 0 or at least 2 .* got 1 and 1"),
        ({"kda_segments": segment(shape=(4,))}, r"multiple of the elements of its shape \[4\]"),
        ({"kda_segments": segment(shape=(0,))}, r"multiple of the elements of its shape \[0\]"),
        ({"kda_pages_per_block": 2}, "pages_per_block of state pages must be 1, got 2"),
        ({"kv_pages_per_block": 3}, "pages_per_block must divide block_tokens = 16, got 3"),
        ({"kda_layers": 0}, "layers must be at least 1, got 0"),
        ({"kda_segments": ()}, "segments must not be empty"),
        ({"kda_segments": segment() + segment()}, "segments must not repeat, got 'q'"),
        ({"kda_segments": segment(units=0)}, "segment q must have units .* got 0 and 6"),
        ({"kda_segments": segment()[::-1]}, "offset of segment q must be at least 1072, got 0"),
        ({"kda_segments": segment(units=3)}, "segment q: tp_size must divide 3 heads, got 2"),
        ({"kda_page_bytes": 83}, "page_bytes must be at least 84, got 83"),
        ({"kv_block_tokens": 5}, "bytes_per_unit of segment k must be a multiple of the 5 tokens"),
    ],
)
def test_impossible_geometries_are_rejected(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(GeometryError, match=match):
        hybrid(**changes)


def test_geometry_survives_json() -> None:
    geometry = hybrid(4)
    assert decode_geometry(decode_json(json.dumps(encode_geometry(geometry)).encode())) == geometry


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, item in items:
        if isinstance(item, (dict, list)):
            found += _paths(item, (*path, key))
        else:
            found.append((*path, key))
    return found


@pytest.mark.parametrize("bad", [None, -1, 1.5, True, "", "x" * 300, "\x00", [], {}, 1 << 50])
def test_every_field_of_untrusted_metadata_is_checked(bad: Any) -> None:
    encoded = json.dumps(encode_geometry(hybrid(kda_segments=segment(shape=(2,)))))
    for path in _paths(json.loads(encoded)):
        if (path[-1], bad) == ("shape", []):
            continue  # nothing is known of it
        value = json.loads(encoded)
        at = value
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = bad
        with pytest.raises(GeometryError):
            decode_geometry(value)
        if isinstance(at, dict):
            del at[path[-1]]
            with pytest.raises(GeometryError, match="must have the fields"):
                decode_geometry(value)
            at[path[-1]] = at["surplus"] = bad
            with pytest.raises(GeometryError, match=r"differs in .*'surplus'"):
                decode_geometry(value)


def test_messages_are_limited_and_versioned() -> None:
    with pytest.raises(GeometryError, match="at most 10 bytes, got 11"):
        decode_json(b"1" * 11, limit=10)
    for text in (b"{", b"\xff", b"[" * 100_000, b"1" * 10_000):
        with pytest.raises(GeometryError, match="must be JSON"):
            decode_json(text)
    with pytest.raises(GeometryError, match="differs in") as refusal:
        decode_geometry({"x" * 1_000_000: 1})
    assert len(str(refusal.value)) < 400  # what is logged of it
    with pytest.raises(GeometryError, match="version of geometry must be 2, got 3"):
        decode_geometry(encode_geometry(hybrid()) | {"version": 3})


def test_ranks_that_do_not_exist() -> None:
    with pytest.raises(GeometryError, match=r"dst_rank must be in \[0, 2\), got 2"):
        source_ranks(4, 2, 2)
    with pytest.raises(GeometryError, match=r"src_rank must be in \[0, 4\), got -1"):
        consumer_ranks(4, 2, -1)
    with pytest.raises(GeometryError, match="must divide the other's, got 3 and 4"):
        source_ranks(4, 3, 0)
