"""Which bytes a rank reads from which ranks, for any pair of tensor-parallel sizes.

One rule covers conv segments, recurrent heads and attention KV heads: a read is the overlap of the
units a rank needs with the units a source rank holds. Pure functions of data.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from kda_ops.transfer.geometry import EngineGeometry, PageGeometry, check_compatible
from kda_ops.transfer.schema import MAX_ITEMS, GeometryError


class Read(NamedTuple):
    """One contiguous range, from a page of a source rank to a page of the reading rank.

    Attributes:
        src_rank: Rank of the source engine.
        segment: Name of the segment.
        src_offset: Bytes from the start of the source's page.
        dst_offset: Bytes from the start of the reader's page.
        nbytes: Length.
    """

    src_rank: int
    segment: str
    src_offset: int
    dst_offset: int
    nbytes: int


class _Overlap(NamedTuple):
    """Whole units as one read, and the bytes of a unit in either page."""

    read: Read
    dst_unit_bytes: int
    src_unit_bytes: int


def source_ranks(src_tp: int, dst_tp: int, dst_rank: int) -> range:
    """The ranks that hold what `dst_rank` needs, and to which it owes a completion notice.

    With at least as many readers as sources, the one rank `dst_rank * src_tp // dst_tp`, else the
    `dst_rank`-th window of `src_tp / dst_tp` ranks.

    Raises:
        GeometryError: Neither size divides the other, or the rank does not exist.
    """
    if src_tp < 1 or dst_tp < 1 or (src_tp % dst_tp and dst_tp % src_tp):
        raise GeometryError(
            f"tp_size of one engine must divide the other's, got {dst_tp} and {src_tp}"
        )
    if not 0 <= dst_rank < dst_tp:
        raise GeometryError(f"dst_rank must be in [0, {dst_tp}), got {dst_rank}")
    if dst_tp >= src_tp:
        rank = dst_rank * src_tp // dst_tp
        return range(rank, rank + 1)
    window = src_tp // dst_tp
    return range(dst_rank * window, (dst_rank + 1) * window)


def consumer_ranks(src_tp: int, dst_tp: int, src_rank: int) -> range:
    """The reading ranks that owe `src_rank` a notice before it may release its pages.

    Raises:
        GeometryError: Neither size divides the other, or the rank does not exist.
    """
    if not 0 <= src_rank < src_tp:
        raise GeometryError(f"src_rank must be in [0, {src_tp}), got {src_rank}")
    source_ranks(src_tp, dst_tp, 0)
    if dst_tp >= src_tp:
        readers = dst_tp // src_tp
        return range(src_rank * readers, (src_rank + 1) * readers)
    rank = src_rank * dst_tp // src_tp
    return range(rank, rank + 1)


def plan_reads(src: PageGeometry, dst: PageGeometry, dst_rank: int) -> list[Read]:
    """The reads that fill one page of `dst_rank`, ordered by destination.

    Every byte of every segment is written exactly once. If several source ranks hold a unit, the
    first provides it. Padding is not read.

    Args:
        src: Pages of the source engine.
        dst: Pages of the reading engine.
        dst_rank: The reading rank.

    Raises:
        GeometryError: The geometries are incompatible (`check_compatible`), or hold different
            numbers of tokens per page: then see `plan_granules`.
    """
    _check(src, dst)
    if src.kind == "attention" and src.page_tokens != dst.page_tokens:
        raise GeometryError(
            f"group {dst.name}: page_tokens must be the same on both engines, "
            f"got {dst.page_tokens} and {src.page_tokens}"
        )
    return [overlap.read for overlap in _overlaps(src, dst, dst_rank)]


class Granules(NamedTuple):
    """Reads in pieces that divide both page sizes of an attention group.

    Attributes:
        src_per_page: Granules in a page of the source.
        dst_per_page: Granules in a page of the reader.
        reads: Reads of one granule, with the offsets of granule 0 in both pages.
        steps: Per read, bytes from one granule of a page to the next, on both sides.
    """

    src_per_page: int
    dst_per_page: int
    reads: list[Read]
    steps: list[int]

    def of_rank(self, src_rank: int) -> "Granules":
        """Only the reads from one source rank."""
        kept = [i for i, read in enumerate(self.reads) if read.src_rank == src_rank]
        return self._replace(
            reads=[self.reads[i] for i in kept], steps=[self.steps[i] for i in kept]
        )


def plan_granules(src: PageGeometry, dst: PageGeometry, dst_rank: int) -> Granules:
    """The reads of one granule: a whole page, or if page sizes differ a common part of both.

    A granule is the greatest number of tokens that divides both page sizes. Read i of granule g of
    a page starts `g * steps[i]` bytes after the read's own offset.

    Raises:
        GeometryError: As for `plan_reads`, without its condition on page sizes; or page sizes with
            such a small common divisor that a page is more than 4096 granules.
    """
    _check(src, dst)
    if src.kind == "state" or src.page_tokens == dst.page_tokens:
        reads = plan_reads(src, dst, dst_rank)
        return Granules(1, 1, reads, [0] * len(reads))
    tokens = math.gcd(src.page_tokens, dst.page_tokens)
    if max(src.page_tokens, dst.page_tokens) // tokens > MAX_ITEMS:
        raise GeometryError(
            f"group {dst.name}: page_tokens must be at most {MAX_ITEMS} times their common "
            f"divisor, got {dst.page_tokens} and {src.page_tokens}"
        )
    # heads come first in a page: some of its tokens are one range per head
    reads = [
        overlap.read._replace(
            src_offset=overlap.read.src_offset + unit * overlap.src_unit_bytes,
            dst_offset=overlap.read.dst_offset + unit * overlap.dst_unit_bytes,
            nbytes=overlap.dst_unit_bytes // dst.page_tokens * tokens,
        )
        for overlap in _overlaps(src, dst, dst_rank)
        for unit in range(overlap.read.nbytes // overlap.dst_unit_bytes)
    ]
    return Granules(
        src.page_tokens // tokens, dst.page_tokens // tokens, reads, [r.nbytes for r in reads]
    )


def plan_zero(dst: PageGeometry, first_token: int, end_token: int) -> list[tuple[int, int]]:
    """Byte ranges `(offset, nbytes)` of tokens `[first_token, end_token)` in an attention page.

    Raises:
        GeometryError: The group is not attention, or the tokens are not in a page.
    """
    if dst.kind != "attention":
        raise GeometryError(f"group {dst.name}: kind must be attention, got {dst.kind}")
    if not 0 <= first_token <= end_token <= dst.page_tokens:
        raise GeometryError(
            f"tokens must be in [0, {dst.page_tokens}] and in order, "
            f"got {first_token} and {end_token}"
        )
    ranges = []
    for segment in dst.segments:
        token_bytes = segment.bytes_per_unit // dst.page_tokens
        for unit in range(len(dst.units_held(segment, 0))):
            start = segment.offset + unit * segment.bytes_per_unit + first_token * token_bytes
            ranges.append((start, (end_token - first_token) * token_bytes))
    return [r for r in ranges if r[1]]


def _check(src: PageGeometry, dst: PageGeometry) -> None:
    check_compatible(EngineGeometry((dst,)), EngineGeometry((src,)))


def _overlaps(src: PageGeometry, dst: PageGeometry, dst_rank: int) -> Iterator[_Overlap]:
    """Units that `dst_rank` needs, each of the first source rank that holds it."""
    ranks = source_ranks(src.tp_size, dst.tp_size, dst_rank)
    for ours, theirs in zip(dst.segments, src.segments, strict=True):
        needed = dst.units_held(ours, dst_rank)
        start = needed.start
        for rank in ranks:  # their first units never decrease from rank to rank
            held = src.units_held(theirs, rank)
            stop = min(needed.stop, held.stop)
            if start >= stop:
                continue
            yield _Overlap(
                Read(
                    rank,
                    ours.name,
                    theirs.offset + (start - held.start) * theirs.bytes_per_unit,
                    ours.offset + (start - needed.start) * ours.bytes_per_unit,
                    (stop - start) * ours.bytes_per_unit,
                ),
                ours.bytes_per_unit,
                theirs.bytes_per_unit,
            )
            start = stop
