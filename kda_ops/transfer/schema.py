"""JSON from an untrusted peer: limited in length, checked field by field."""

import json
from collections.abc import Callable, Mapping
from typing import Any

VERSION = 2
MAX_BYTES = 1 << 20
MAX_COUNT = 1 << 40
MAX_ITEMS = 4096
MAX_NAME = 256
MAX_DIMENSIONS = 8


class GeometryError(ValueError):
    """Malformed metadata, or two incompatible geometries."""


def decode_json(message: bytes, *, limit: int = MAX_BYTES) -> Any:
    """JSON of at most `limit` bytes.

    Raises:
        GeometryError: Too long, or not JSON.
    """
    if len(message) > limit:
        raise GeometryError(f"message must have at most {limit} bytes, got {len(message)}")
    try:
        return json.loads(message)
    except (ValueError, RecursionError) as error:
        raise GeometryError(f"message must be JSON, got {error}") from None


def shown(value: Any) -> str:
    """A value for an error message: short, printable, and never too deep for Python to print."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    return f"{value!a:.80}"


def take_fields(
    name: str, value: Any, schema: Mapping[str, Callable[[str, Any], Any]]
) -> dict[str, Any]:
    """A JSON object with exactly the fields of `schema`, each checked by its function."""
    if not isinstance(value, dict):
        raise GeometryError(f"{name} must be an object, got {type(value).__name__}")
    if value.keys() != schema.keys():
        wrong = sorted(value.keys() ^ schema.keys())
        raise GeometryError(
            f"{name} must have the fields {sorted(schema)}, differs in {wrong[:8]!a:.200}"
        )
    return {field: check(f"{field} of {name}", value[field]) for field, check in schema.items()}


def take_count(name: str, value: Any) -> int:
    """An integer in `[0, 2**40]`."""
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise GeometryError(f"{name} must be an integer in [0, {MAX_COUNT}], got {shown(value)}")
    return value


def take_name(name: str, value: Any) -> str:
    """A printable string of 1 to 256 characters."""
    if type(value) is not str or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise GeometryError(
            f"{name} must be a printable string of 1 to {MAX_NAME} characters, got {shown(value)}"
        )
    return value


def take_list(name: str, value: Any) -> list[Any]:
    """A list of at most 4096 items."""
    if type(value) is not list or len(value) > MAX_ITEMS:
        raise GeometryError(f"{name} must be a list of at most {MAX_ITEMS} items")
    return value


def take_shape(name: str, value: Any) -> tuple[int, ...]:
    """The sizes of at most 8 dimensions, a list in JSON."""
    if type(value) is not list or len(value) > MAX_DIMENSIONS:
        raise GeometryError(f"{name} must be a list of at most {MAX_DIMENSIONS} sizes")
    return tuple(take_count(f"size of {name}", size) for size in value)
