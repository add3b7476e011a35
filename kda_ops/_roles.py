"""What an argument of an operator stands for, where its dtype and shape do not say it: declared in
`define_op(roles=...)`, for what must make arguments on which a call has work to do
(`kda_ops.tuning.example_inputs`).
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Pages:
    """States in pages; `axis` is that of the slots, counted from the end."""

    axis: int


class Table(Enum):
    """Integers with a meaning."""

    SLOTS = "the page of each sequence"
    OFFSETS = "where sequences begin and end, N + 1 of them"
    CHUNKS = "the chunk table of these offsets"
    COPIES = "two sources, target and bias of each copy of a page"


Role = Pages | Table
CONV_PAGES, STATE_PAGES = Pages(-3), Pages(-4)
SLOTS, OFFSETS, CHUNKS, COPIES = Table
