"""Roles of operator arguments, where dtype and shape do not say what they mean: declared in
`define_op(roles=...)`, so that `kda_ops.tuning.example_inputs` can make realistic arguments.
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Pages:
    """Paged states; `axis` is the axis of the slots, counted from the end."""

    axis: int


class Table(Enum):
    """Tables of integers."""

    SLOTS = "the page of each sequence"
    OFFSETS = "where sequences begin and end, N + 1 of them"
    CHUNKS = "the chunk table of these offsets"
    COPIES = "two sources, target and bias of each copy of a page"
    BLOCKS = "the page of each full block of each sequence"
    CONTEXTS = "the tokens of each sequence before the call"


Role = Pages | Table
CONV_PAGES, STATE_PAGES = Pages(-3), Pages(-4)
SLOTS, OFFSETS, CHUNKS, COPIES, BLOCKS, CONTEXTS = Table
