"""`KDAStateSpec`: sizes by hand, pages that do not overlap, sharding, errors."""

import dataclasses
import re

import pytest
import torch

from kda_ops import config
from kda_ops.cache.spec import KDAStateSpec, Segment, units_held

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SPECS = {
    "kimi-linear": KDAStateSpec(32, 32, 128, 128, conv_dtype=BF16),
    "kimi-linear-tp8-spec3": KDAStateSpec(
        32, 32, 128, 128, conv_dtype=BF16, tp_size=8, num_spec=3, layout="DS"
    ),
    "grouped-values": KDAStateSpec(2, 6, 24, 40, conv_dtype=FP16, recurrent_dtype=BF16),
    "wide-values-ds": KDAStateSpec(3, 3, 16, 48, conv_dtype=FP32, layout="DS", num_spec=1),
    "replicated-keys": KDAStateSpec(2, 8, 16, 8, conv_dtype=BF16, tp_size=4, layout="DS"),
    "odd": KDAStateSpec(1, 1, 3, 5, conv_dtype=BF16, conv_size=2, page_bytes=1028),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def test_kimi_linear_by_hand() -> None:
    spec = SPECS["kimi-linear"]
    assert (spec.conv_length, spec.conv_dim) == (3, 12288)
    assert spec.conv_shape == (3, 12288)
    assert spec.recurrent_shape == (32, 128, 128)
    assert (spec.conv_dtype, spec.recurrent_dtype, spec.layout) == (BF16, FP32, "SD")
    assert spec.segments == (
        Segment("q", 32, 768),
        Segment("k", 32, 768),
        Segment("v", 32, 768),
        Segment("recurrent", 32, 65536),
    )
    assert spec.offset("recurrent") == 73728
    assert spec.page_bytes == 73728 + 2097152


def test_sharded_by_hand() -> None:
    spec = SPECS["kimi-linear-tp8-spec3"]
    assert spec.conv_shape == (1536, 6)
    assert spec.recurrent_shape == (4, 128, 128)
    assert [spec.local_bytes(s.name) for s in spec.segments] == [6144, 6144, 6144, 262144]
    assert [spec.offset(s.name) for s in spec.segments] == [0, 6144, 12288, 18432]
    assert spec.units_held("v", 3) == range(12, 16)


def test_unequal_parts_by_hand() -> None:
    spec = SPECS["grouped-values"]
    assert spec.conv_sizes == (48, 48, 240)
    assert spec.recurrent_shape == (6, 40, 24)
    assert spec.segments[2] == Segment("v", 6, 40 * 3 * 2)
    assert spec.segments[3] == Segment("recurrent", 6, 40 * 24 * 2)
    assert spec.offset("recurrent") == 2048  # 336 * 3 * 2 = 2016 bytes of conv, aligned


def test_replicated_keys_by_hand() -> None:
    spec = SPECS["replicated-keys"]
    assert spec.conv_sizes == (16, 16, 16)
    assert [list(spec.units_held("q", r)) for r in range(4)] == [[0], [0], [1], [1]]
    assert [list(spec.units_held("recurrent", r)) for r in range(4)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    for rank in range(4):  # each rank holds the key head that its value heads use
        groups = spec.num_v_heads // spec.num_k_heads
        keys = {v // groups for v in spec.units_held("recurrent", rank)}
        assert keys == set(spec.units_held("k", rank))


@pytest.mark.parametrize(("units", "tp_size"), [(8, 1), (8, 4), (8, 8), (2, 8), (1, 4), (3, 6)])
def test_ranks_cover_every_unit(units: int, tp_size: int) -> None:
    held = [units_held(units, tp_size, rank) for rank in range(tp_size)]
    assert {unit for part in held for unit in part} == set(range(units))
    assert len({len(part) for part in held}) == 1
    assert sum(map(len, held)) == max(units, tp_size)
    assert [part.start for part in held] == sorted(part.start for part in held)


@every_spec
@pytest.mark.parametrize("layers", [None, 3])
def test_views_of_pages_do_not_overlap(spec: KDAStateSpec, layers: int | None) -> None:
    slots = 4
    conv, recurrent = spec.allocate(slots, layers=layers)
    lead = (slots,) if layers is None else (layers, slots)
    assert conv.shape == (*lead, *spec.conv_shape)
    assert recurrent.shape == (*lead, *spec.recurrent_shape)
    assert (conv.dtype, recurrent.dtype) == (spec.conv_dtype, spec.recurrent_dtype)
    pages = conv.untyped_storage()
    assert pages.data_ptr() == recurrent.untyped_storage().data_ptr()
    assert len(pages) == spec.page_bytes * torch.Size(lead).numel()
    buffer = torch.empty(0, dtype=torch.uint8).set_(pages)
    assert not buffer.any()

    # each byte is written once: conv as 1, recurrent as 2, and what remains is padding
    for state, mark in ((conv, 1), (recurrent, 2)):
        state.view(torch.int16 if state.element_size() == 2 else torch.int32).add_(
            mark * (0x0101 if state.element_size() == 2 else 0x01010101)
        )
    page = buffer.view(-1, spec.page_bytes)
    conv_bytes = torch.Size(spec.conv_shape).numel() * spec.conv_dtype.itemsize
    start = spec.offset("recurrent")
    end = start + spec.local_bytes("recurrent")
    assert (page[:, :conv_bytes] == 1).all()
    assert (page[:, start:end] == 2).all()
    assert not page[:, conv_bytes:start].any()
    assert not page[:, end:].any()


@every_spec
def test_segments_add_up(spec: KDAStateSpec) -> None:
    conv = sum(spec.local_bytes(name) for name in "qkv")
    assert conv == torch.Size(spec.conv_shape).numel() * spec.conv_dtype.itemsize
    assert 0 <= spec.offset("recurrent") - conv < 128
    recurrent = torch.Size(spec.recurrent_shape).numel() * spec.recurrent_dtype.itemsize
    assert spec.local_bytes("recurrent") == recurrent
    assert spec.page_bytes >= spec.offset("recurrent") + recurrent


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_segment_offsets_find_the_channels(layout: str) -> None:
    spec = dataclasses.replace(SPECS["grouped-values"], layout=layout)
    conv, _ = spec.allocate(2)
    channel = torch.arange(spec.conv_dim, dtype=FP16)
    conv[1].copy_(channel.expand(3, -1) if layout == "SD" else channel[:, None].expand(-1, 3))
    page = torch.empty(0, dtype=torch.uint8).set_(conv.untyped_storage())[spec.page_bytes :]
    q, k, _ = spec.conv_sizes
    for name, first in (("q", 0), ("k", q), ("v", q + k)):
        part = page[spec.offset(name) :]
        if layout == "DS":
            part = part[: spec.local_bytes(name)].view(FP16)
            assert torch.equal(part, channel[first : first + len(part) // 3].repeat_interleave(3))
        else:
            assert part[:2].view(FP16).item() == first


def test_pages_beyond_32_bits() -> None:
    spec = SPECS["kimi-linear"]
    conv, recurrent = spec.allocate(1024, layers=2, device="meta")
    assert recurrent.stride()[:2] == (1024 * spec.page_bytes // 4, spec.page_bytes // 4)
    assert conv.stride()[:2] == (1024 * spec.page_bytes // 2, spec.page_bytes // 2)
    assert conv.stride(0) > 2**30


def test_spec_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KDAStateSpec(2, 2, 8, 8, conv_dtype=BF16)
    assert spec == KDAStateSpec(2, 2, 8, 8, conv_dtype=BF16, recurrent_dtype="float32", layout="SD")
    assert len({spec, KDAStateSpec(2, 2, 8, 8, conv_dtype=BF16, recurrent_dtype=FP32)}) == 1
    monkeypatch.setattr(config, "conv_layout", "DS")
    other = KDAStateSpec(2, 2, 8, 8, conv_dtype=BF16)
    assert (spec.layout, other.layout) == ("SD", "DS")
    assert spec != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.layout = "DS"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_k_heads": 0}, "num_k_heads must be at least 1, got 0"),
        ({"head_v_dim": -1}, "head_v_dim must be at least 1, got -1"),
        ({"conv_size": 1}, "conv_size must be at least 2, got 1"),
        ({"num_spec": -1}, "num_spec must be at least 0, got -1"),
        ({"tp_size": 0}, "tp_size must be at least 1, got 0"),
        ({"num_v_heads": 6}, "num_v_heads must be a multiple of num_k_heads = 4, got 6"),
        ({"conv_dtype": torch.int8}, "conv_dtype must be bfloat16, float16, float32, got int8"),
        (
            {"recurrent_dtype": FP16},
            "recurrent_dtype must be auto, float32 or bfloat16, got float16",
        ),
        ({"recurrent_dtype": "fp8"}, "recurrent_dtype must be auto, float32 or bfloat16, got fp8"),
        ({"layout": "DL"}, "layout must be one of SD, DS, auto, got 'DL'"),
        ({"tp_size": 3}, "tp_size must divide 4 heads, got 3"),
        ({"tp_size": 6, "num_v_heads": 12}, "tp_size must be a multiple of 4 replicated heads"),
        ({"page_bytes": 2560}, "page_bytes must be at least 2816, got 2560"),
        ({"page_bytes": 2818}, "page_bytes must be a multiple of 4, got 2818"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    arguments = {
        "num_k_heads": 4,
        "num_v_heads": 4,
        "head_k_dim": 8,
        "head_v_dim": 16,
        "conv_dtype": BF16,
    } | options
    with pytest.raises(ValueError, match=re.escape(message)):
        KDAStateSpec(**arguments)


def test_errors_of_methods() -> None:
    spec = SPECS["odd"]
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        spec.allocate(0)
    with pytest.raises(ValueError, match="layers must be None or at least 1, got 0"):
        spec.allocate(1, layers=0)
    with pytest.raises(ValueError, match="name must be q, k, v or recurrent, got 'o'"):
        spec.offset("o")
    with pytest.raises(ValueError, match=re.escape("rank must be in [0, 4), got 4")):
        units_held(8, 4, 4)
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        units_held(0, 4, 0)
