"""Messages between engines: a reader's hello, a source rank's card, a consumer's notice.

Versioned JSON of limited length from untrusted peers: every field is checked by name and type,
nothing is executed.
"""

import base64
import binascii
import json
from dataclasses import fields
from typing import Any, NamedTuple

from kda_ops.transfer.board import BOARD_BYTES
from kda_ops.transfer.geometry import EngineGeometry, PageGeometry, PlacedSegment
from kda_ops.transfer.schema import (
    VERSION,
    GeometryError,
    decode_json,
    shown,
    take_count,
    take_fields,
    take_list,
    take_name,
    take_shape,
)
from kda_ops.transfer.transport import MEMORIES, Region

MAX_HELLO = 1 << 20  # from anyone who connects; decoded it takes twenty times as much
MAX_HANDSHAKE = 16 << 20
MAX_NOTICE = 4096
MAX_ERROR = 1000


class Hello(NamedTuple):
    """How a rank that wants to read introduces itself.

    Attributes:
        engine: Name of its engine.
        rank: Rank of the reader.
        agent: Name of its transport.
        geometry: Geometry of its engine.
    """

    engine: str
    rank: int
    agent: str
    geometry: EngineGeometry


class Card(NamedTuple):
    """How a source rank answers.

    Attributes:
        engine: Name of its engine.
        rank: Rank of the source.
        geometry: Geometry of its engine.
        agent: Metadata of its transport.
        memory: Memory of its pages, `"cpu"` or `"cuda"`.
        regions: Regions of its pages, per group and layer.
        board: Region of its board.
    """

    engine: str
    rank: int
    geometry: EngineGeometry
    agent: bytes
    memory: str
    regions: list[list[Region]]
    board: Region


class Notice(NamedTuple):
    """Tells a source that a consumer rank has read a request.

    Attributes:
        engine: Name of the consumer's engine.
        rank: Rank of the consumer.
        request: Id of the request.
        offer: Number of the offer it was read from, 0 if nothing was read.
        blocks: `blocks_digest` of the request, in hexadecimal.
    """

    engine: str
    rank: int
    request: str
    offer: int
    blocks: str


def encode_geometry(geometry: EngineGeometry) -> dict[str, Any]:
    """The geometry as JSON values; `decode_geometry` is its inverse."""
    return {
        "version": VERSION,
        "groups": [
            {
                **{f.name: getattr(group, f.name) for f in fields(PageGeometry)},
                "segments": [
                    {f.name: getattr(segment, f.name) for f in fields(PlacedSegment)}
                    for segment in group.segments
                ],
            }
            for group in geometry.groups
        ],
    }


def decode_geometry(value: Any) -> EngineGeometry:
    """A geometry from a peer's JSON values.

    Raises:
        GeometryError: Anything but a well-formed geometry of this version.
    """
    top = take_fields("geometry", value, {"version": take_count, "groups": take_list})
    if top["version"] != VERSION:
        raise GeometryError(f"version of geometry must be {VERSION}, got {top['version']}")
    groups = []
    for item in top["groups"]:
        group = take_fields("group", item, _GROUP)
        segments = tuple(
            PlacedSegment(**take_fields("segment", segment, _SEGMENT))
            for segment in group.pop("segments")
        )
        groups.append(PageGeometry(segments=segments, **group))
    return EngineGeometry(tuple(groups))


def encode_hello(hello: Hello) -> bytes:
    """The inverse of `decode_hello`."""
    return _encode({**hello._asdict(), "geometry": encode_geometry(hello.geometry)})


def decode_hello(message: bytes) -> Hello:
    """A hello from a peer.

    Raises:
        GeometryError: Anything but a well-formed hello of this version.
    """
    found = _decode("handshake", message, _HELLO, limit=MAX_HELLO)
    hello = Hello(**found | {"geometry": decode_geometry(found["geometry"])})
    if hello.rank >= hello.geometry.tp_size:
        raise GeometryError(
            f"rank of handshake must be below {hello.geometry.tp_size}, got {hello.rank}"
        )
    return hello


def encode_card(card: Card) -> bytes:
    """The inverse of `decode_card`."""
    return _encode(
        {
            **card._asdict(),
            "geometry": encode_geometry(card.geometry),
            "agent": base64.b64encode(card.agent).decode(),
            "regions": [[list(region) for region in layers] for layers in card.regions],
            "board": list(card.board),
        }
    )


def encode_refusal(error: Exception) -> bytes:
    """The answer to a rejected hello."""
    return _encode({"error": str(error)[:MAX_ERROR]})


def decode_card(answer: bytes, engine: str, rank: int) -> Card:
    """The card that a rank answered with.

    Args:
        answer: From a peer.
        engine: The engine that the hello was sent to.
        rank: The rank that the hello was sent to.

    Raises:
        GeometryError: A refusal, the card of another rank, regions too short for the geometry, or
            anything but a well-formed card of this version.
    """
    value = decode_json(answer, limit=MAX_HANDSHAKE)
    if isinstance(value, dict) and "error" in value:
        raise GeometryError(f"rank {rank} refused: {_printable(value['error'])}")
    found = _check("answer", value, _CARD)
    for name, expected in (("engine", engine), ("rank", rank)):
        if found[name] != expected:
            raise GeometryError(f"{name} of answer must be {expected!r}, got {found[name]!r}")
    geometry = decode_geometry(found["geometry"])
    regions = _take_regions(geometry, found["regions"])
    try:
        agent = base64.b64decode(found["agent"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise GeometryError(f"agent of answer must be base64, got {error}") from None
    if found["memory"] not in MEMORIES:
        raise GeometryError(
            f"memory of answer must be {' or '.join(MEMORIES)}, got {found['memory']!r}"
        )
    board = _take_region("board", found["board"], BOARD_BYTES)._replace(nbytes=BOARD_BYTES)
    return Card(engine, rank, geometry, agent, found["memory"], regions, board)


def encode_notice(notice: Notice) -> bytes:
    """The inverse of `decode_notice`."""
    return _encode(notice._asdict())


def decode_notice(message: bytes) -> Notice:
    """A notice from a peer.

    Raises:
        GeometryError: Anything but a well-formed notice of this version.
    """
    return Notice(**_decode("notice", message, _NOTICE, limit=MAX_NOTICE))


def _encode(fields: dict[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **fields}).encode()


def _decode(name: str, message: bytes, schema: dict[str, Any], *, limit: int) -> dict[str, Any]:
    return _check(name, decode_json(message, limit=limit), schema)


def _check(name: str, value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of a message of this version, without its version."""
    found = take_fields(name, value, {"version": take_count, **schema})
    version = found.pop("version")
    if version != VERSION:
        raise GeometryError(f"version must be {VERSION}, got {version}")
    return found


def _take_regions(geometry: EngineGeometry, value: Any) -> list[list[Region]]:
    """Regions of a peer, long enough for the pages it claims."""
    value = take_list("regions", value)
    if len(value) != len(geometry.groups):
        raise GeometryError(f"regions must have {len(geometry.groups)} groups, got {len(value)}")
    regions = []
    for group, layers in zip(geometry.groups, value, strict=True):
        layers = take_list(f"regions of group {group.name}", layers)
        if len(layers) != group.layers:
            raise GeometryError(
                f"regions of group {group.name} must have {group.layers} layers, got {len(layers)}"
            )
        needed = group.pages * group.page_bytes
        where = f"region of group {group.name}"
        regions.append([_take_region(where, layer, needed) for layer in layers])
    return regions


def _take_region(name: str, value: Any, needed: int) -> Region:
    """A region of a peer with at least the bytes needed."""
    numbers = take_list(name, value)
    if len(numbers) != 3 or any(type(n) is not int or n < 0 for n in numbers):
        raise GeometryError(f"{name} must be address, bytes, device, got {shown(value)}")
    address, nbytes, _ = numbers
    if nbytes < needed or address + nbytes >= 1 << 64:
        raise GeometryError(f"{name} must have at least {needed} bytes, got {nbytes} at {address}")
    return Region(*numbers)


def _printable(error: Any) -> str:
    """A peer's error, made safe for a log."""
    if type(error) is not str:
        return shown(error)
    return "".join(c if c.isprintable() else "?" for c in error[:MAX_ERROR])


def _take_any(name: str, value: Any) -> Any:
    return value


def _take_text(name: str, value: Any) -> str:
    if type(value) is not str:
        raise GeometryError(f"{name} must be a string, got {type(value).__name__}")
    return value


_SEGMENT = {
    "name": take_name,
    "units": take_count,
    "bytes_per_unit": take_count,
    "dtype": take_name,
    "offset": take_count,
    "shape": take_shape,
}
_GROUP = {
    "name": take_name,
    "kind": take_name,
    "segments": take_list,
    "tp_size": take_count,
    "layout": take_name,
    "conv_size": take_count,
    "num_spec": take_count,
    "block_tokens": take_count,
    "pages_per_block": take_count,
    "page_bytes": take_count,
    "pages": take_count,
    "layers": take_count,
}
_WHO = {"engine": take_name, "rank": take_count}
_HELLO = {**_WHO, "agent": take_name, "geometry": _take_any}
_CARD = {
    **_WHO,
    "geometry": _take_any,
    "agent": _take_text,
    "memory": take_name,
    "regions": _take_any,
    "board": _take_any,
}
_NOTICE = {**_WHO, "request": take_name, "offer": take_count, "blocks": take_name}
