"""The layout of an engine's pages, as data that two engines exchange in a handshake.

A page is one block of one layer on one rank. `PageGeometry` has the place of every segment in it;
`EngineGeometry` has all groups of an engine and is what a handshake carries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kda_ops.cache.spec import KDAStateSpec, Segment, units_held
from kda_ops.config import AUTO, LAYOUTS
from kda_ops.transfer.schema import GeometryError

KINDS = ("state", "attention")


@dataclass(frozen=True)
class PlacedSegment:
    """A segment and its place in a page.

    Attributes:
        name: Such as `"q"` or `"recurrent"`; unique in its page.
        units: Heads of the whole layer, before tensor parallelism.
        bytes_per_unit: Bytes of one head in one page, the same on every rank.
        dtype: Name of the element type, such as `"bfloat16"`.
        offset: Byte offset in a page, the same on every rank.
        shape: Shape of one head, without rows and tokens: `(K,)` for q and k, `(V, K)` for the
            recurrent state. Empty if only bytes are known: then only their number is compared.
    """

    name: str
    units: int
    bytes_per_unit: int
    dtype: str
    offset: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class PageGeometry:
    """The pages of one group of layers on every rank of an engine.

    Attributes:
        name: Name of the group; unique in its engine.
        kind: `"state"` (a page is a whole running state) or `"attention"` (a page holds keys and
            values of `block_tokens` tokens, heads first: a unit is all tokens of one head).
        segments: In page order. In layout SD the channels of the conv segments are interleaved row
            by row, and their ranges only say which bytes the conv state covers; therefore SD needs
            equal TP sizes.
        tp_size: Tensor-parallel ranks.
        layout: `"DS"` or `"SD"`; attention pages are `"DS"`.
        conv_size: Width of a state's short convolution, 0 where there is none.
        num_spec: Speculative tokens per step of a state: each adds a row to the conv state, and its
            block ids may end in as many blocks after the running one. 0 for attention.
        block_tokens: Tokens between two block boundaries.
        pages_per_block: Pages that one block id stands for. State blocks are always one page.
        page_bytes: From one page to the next, including padding.
        pages: Pages of each layer.
        layers: Layers in the group.

    Raises:
        GeometryError: An invalid field, segments that overlap or exceed a page, heads that do not
            divide over the ranks.
    """

    name: str
    kind: str
    segments: tuple[PlacedSegment, ...]
    tp_size: int
    layout: str
    conv_size: int
    num_spec: int
    block_tokens: int
    pages_per_block: int
    page_bytes: int
    pages: int
    layers: int

    def __post_init__(self) -> None:
        where = f"group {self.name}: "
        if self.kind not in KINDS:
            raise GeometryError(f"{where}kind must be {' or '.join(KINDS)}, got {self.kind!r}")
        if self.layout not in LAYOUTS:
            raise GeometryError(
                f"{where}layout must be {' or '.join(LAYOUTS)}, got {self.layout!r}"
            )
        if self.kind == "attention" and self.layout != "DS":
            raise GeometryError(f"{where}layout of attention pages must be DS, got {self.layout}")
        if self.kind == "state" and self.pages_per_block != 1:
            raise GeometryError(
                f"{where}pages_per_block of state pages must be 1, got {self.pages_per_block}"
            )
        if self.kind == "attention":
            for name in ("conv_size", "num_spec"):
                if getattr(self, name):
                    raise GeometryError(
                        f"{where}{name} of attention pages must be 0, got {getattr(self, name)}"
                    )
        if self.conv_size == 1 or self.conv_size < 0 or self.num_spec < 0:
            raise GeometryError(
                f"{where}conv_size must be 0 or at least 2 and num_spec at least 0, "
                f"got {self.conv_size} and {self.num_spec}"
            )
        for name in ("tp_size", "block_tokens", "pages_per_block", "page_bytes", "pages", "layers"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{where}{name} must be at least 1, got {getattr(self, name)}")
        if self.block_tokens % self.pages_per_block:
            raise GeometryError(
                f"{where}pages_per_block must divide block_tokens = {self.block_tokens}, "
                f"got {self.pages_per_block}"
            )
        if not self.segments:
            raise GeometryError(f"{where}segments must not be empty, got none")
        end = 0
        names = set()
        for segment in self.segments:
            if segment.name in names:
                raise GeometryError(f"{where}segments must not repeat, got {segment.name!r} twice")
            names.add(segment.name)
            if segment.units < 1 or segment.bytes_per_unit < 1:
                raise GeometryError(
                    f"{where}segment {segment.name} must have units and bytes_per_unit of at "
                    f"least 1, got {segment.units} and {segment.bytes_per_unit}"
                )
            elements = math.prod(segment.shape)
            if elements < 1 or segment.bytes_per_unit % elements:
                raise GeometryError(
                    f"{where}bytes_per_unit of segment {segment.name} must be a multiple of the "
                    f"elements of its shape {list(segment.shape)}, got {segment.bytes_per_unit}"
                )
            if self.kind == "attention" and segment.bytes_per_unit % self.page_tokens:
                raise GeometryError(
                    f"{where}bytes_per_unit of segment {segment.name} must be a multiple of the "
                    f"{self.page_tokens} tokens of a page, got {segment.bytes_per_unit}"
                )
            if segment.offset < end:
                raise GeometryError(
                    f"{where}offset of segment {segment.name} must be at least {end}, "
                    f"got {segment.offset}"
                )
            end = segment.offset + self.local_bytes(segment)
        if end > self.page_bytes:
            raise GeometryError(f"{where}page_bytes must be at least {end}, got {self.page_bytes}")

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self.block_tokens // self.pages_per_block

    def units_held(self, segment: PlacedSegment, rank: int) -> range:
        """The units of a segment that a rank holds."""
        try:
            return units_held(segment.units, self.tp_size, rank)
        except ValueError as error:
            raise GeometryError(f"group {self.name}: segment {segment.name}: {error}") from None

    def local_bytes(self, segment: PlacedSegment) -> int:
        """Bytes of a segment in a page of any rank."""
        return len(self.units_held(segment, 0)) * segment.bytes_per_unit


@dataclass(frozen=True)
class EngineGeometry:
    """All groups of an engine.

    Attributes:
        groups: One per list of block ids, in the order of the lists.

    Raises:
        GeometryError: No group, duplicate names, or groups with different `tp_size`.
    """

    groups: tuple[PageGeometry, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise GeometryError("groups must not be empty, got none")
        sizes = {group.tp_size for group in self.groups}
        if len(sizes) > 1:
            raise GeometryError(f"tp_size must be one for all groups, got {sorted(sizes)}")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise GeometryError(f"names of groups must not repeat, got {names}")

    @property
    def tp_size(self) -> int:
        return self.groups[0].tp_size


def state_geometry(
    spec: KDAStateSpec, *, name: str = "kda", pages: int, layers: int = 1, block_tokens: int
) -> PageGeometry:
    """The geometry of KDA states as `spec.allocate` lays them out.

    Args:
        spec: The states.
        name: Name of the group.
        pages: Slots of each layer, including the null block.
        layers: Layers of the group.
        block_tokens: Tokens between two checkpoints of the state.

    Raises:
        ValueError: The spec's layout is `"auto"`, or as for `PageGeometry`.
    """
    layout, page_bytes = spec.layout, spec.page_bytes
    if layout is None or page_bytes is None:
        raise ValueError(f"spec must have been resolved by its constructor, got {spec}")
    if layout == AUTO:
        raise ValueError(f"spec must have a layout; spec.decide_layout(transfer=True), got {spec}")
    K, V = spec.head_k_dim, spec.head_v_dim
    shapes = {"q": (K,), "k": (K,), "v": (V,), "recurrent": (V, K)}
    dtypes = {"recurrent": str(spec.recurrent_dtype).removeprefix("torch.")}
    conv_dtype = str(spec.conv_dtype).removeprefix("torch.")
    placed = []
    start = 0
    for segment in spec.segments:
        if spec.layout == "DS" or segment.name == "recurrent":
            start = spec.offset(segment.name)
        placed.append(
            PlacedSegment(
                segment.name,
                segment.units,
                segment.bytes_per_unit,
                dtypes.get(segment.name, conv_dtype),
                start,
                shapes[segment.name],
            )
        )
        start += spec.local_bytes(segment.name)
    return PageGeometry(
        name=name,
        kind="state",
        segments=tuple(placed),
        tp_size=spec.tp_size,
        layout=layout,
        conv_size=spec.conv_size or 0,
        num_spec=spec.num_spec,
        block_tokens=block_tokens,
        pages_per_block=1,
        page_bytes=page_bytes,
        pages=pages,
        layers=layers,
    )


def packed_geometry(
    segments: list[Segment],
    *,
    name: str,
    kind: str,
    dtypes: Mapping[str, str],
    tp_size: int,
    pages: int,
    block_tokens: int,
    layout: str = "DS",
    conv_size: int = 0,
    num_spec: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    pages_per_block: int = 1,
    page_bytes: int | None = None,
    layers: int = 1,
) -> PageGeometry:
    """A geometry whose segments follow one another without gaps.

    For attention (`k` and `v`, a unit is a KV head), Mamba2 (`x`, `B`, `C`, `ssm`; a unit of `B`
    and `C` is one of the `n_groups`) and Gated DeltaNet.

    Args:
        segments: In page order, of the whole layer.
        name: Name of the group.
        kind: `"state"` or `"attention"`.
        dtypes: Name of the element type of every segment.
        tp_size: Tensor-parallel ranks.
        pages: Pages of each layer.
        block_tokens: Tokens between two block boundaries.
        layout: See `PageGeometry`.
        conv_size: See `PageGeometry`.
        num_spec: Likewise.
        shapes: Per segment, see `PlacedSegment`; may omit some.
        pages_per_block: See `PageGeometry`.
        page_bytes: None means no padding.
        layers: Layers of the group.

    Raises:
        GeometryError: As for `PageGeometry`, or a segment without a dtype.
    """
    placed, end, shapes = [], 0, shapes or {}
    for segment in segments:
        if segment.name not in dtypes:
            raise GeometryError(
                f"group {name}: dtypes must name segment {segment.name}, got {sorted(dtypes)}"
            )
        placed.append(
            PlacedSegment(
                segment.name,
                segment.units,
                segment.bytes_per_unit,
                dtypes[segment.name],
                end,
                tuple(shapes.get(segment.name, ())),
            )
        )
        try:
            held = units_held(segment.units, tp_size, 0)
        except ValueError as error:
            raise GeometryError(f"group {name}: segment {segment.name}: {error}") from None
        end += len(held) * segment.bytes_per_unit
    return PageGeometry(
        name=name,
        kind=kind,
        segments=tuple(placed),
        tp_size=tp_size,
        layout=layout,
        conv_size=conv_size,
        num_spec=num_spec,
        block_tokens=block_tokens,
        pages_per_block=pages_per_block,
        page_bytes=end if page_bytes is None else page_bytes,
        pages=pages,
        layers=layers,
    )


def check_compatible(local: EngineGeometry, remote: EngineGeometry) -> None:
    """Checks that two engines can share pages.

    The meaning of bytes is compared field by field, never by a total: equal byte counts may be
    other rows, elements or shapes. Sizes, numbers and places of pages, blocks and segments may
    differ, and `tp_size` in layout DS: a plan accounts for them.

    Raises:
        GeometryError: They cannot; names the first field that differs and both values.
    """
    _same("number of groups", len(local.groups), len(remote.groups))
    p, d = remote.tp_size, local.tp_size
    if p % d and d % p:
        raise GeometryError(f"tp_size of one engine must divide the other's, got {d} and {p}")
    for ours, theirs in zip(local.groups, remote.groups, strict=True):
        _same("name of a group", ours.name, theirs.name)
        where = f"group {ours.name}: "
        for field in ("kind", "layout", "conv_size", "num_spec", "layers"):
            _same(where + field, getattr(ours, field), getattr(theirs, field))
        _same(where + "number of segments", len(ours.segments), len(theirs.segments))
        for a, b in zip(ours.segments, theirs.segments, strict=True):
            _same(where + "name of a segment", a.name, b.name)
            for field in ("units", "dtype", "shape"):
                _same(f"{where}{field} of segment {a.name}", getattr(a, field), getattr(b, field))
            if ours.kind == "attention":
                _same(
                    f"{where}bytes per token and unit of segment {a.name}",
                    a.bytes_per_unit // ours.page_tokens,
                    b.bytes_per_unit // theirs.page_tokens,
                )
            else:
                _same(
                    f"{where}bytes_per_unit of segment {a.name}", a.bytes_per_unit, b.bytes_per_unit
                )
        if ours.layout == "SD":
            _same(where + "tp_size in layout SD", ours.tp_size, theirs.tp_size)


def _same(field: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise GeometryError(
            f"{field} must be the same on both engines, got {ours!r} and {theirs!r}"
        )
