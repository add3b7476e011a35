"""Which local pages take which remote pages of a request, with prefix caching on the local side.

Each side has one list of block ids per group, positional: entry i of the remote list holds tokens
from `i * remote_block_tokens`. The local list may lack blocks at its front: those that a prefix
hit found. Pure data in, data out; what bytes a page contains is `kda_ops.transfer.plan`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kda_ops.transfer.geometry import EngineGeometry

NULL_BLOCK = 0


@dataclass(frozen=True)
class BlockGroup:
    """What one group of layers keeps in its blocks.

    Attributes:
        kind: `"state"` (a block is one running state) or `"attention"`.
        local_block_tokens: Tokens of a local block.
        remote_block_tokens: Tokens of a remote block.
        local_pages_per_block: Pages that one local block id stands for: block b is pages
            `b * ratio` to `b * ratio + ratio - 1`. States never expand.
        remote_pages_per_block: The same of the remote engine, which may have another ratio.

    Raises:
        ValueError: An unknown kind, a number below 1, a ratio that does not divide its block.
    """

    kind: str
    local_block_tokens: int
    remote_block_tokens: int
    local_pages_per_block: int = 1
    remote_pages_per_block: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("state", "attention"):
            raise ValueError(f"kind must be state or attention, got {self.kind!r}")
        for side in ("local", "remote"):
            tokens, pages = (
                getattr(self, f"{side}_{field}") for field in ("block_tokens", "pages_per_block")
            )
            if tokens < 1 or pages < 1 or tokens % pages:
                raise ValueError(
                    f"{side}_pages_per_block must be at least 1 and divide "
                    f"{side}_block_tokens = {tokens}, got {pages}"
                )
            if self.kind == "state" and pages != 1:
                raise ValueError(f"{side}_pages_per_block of a state must be 1, got {pages}")


class PageCopy(NamedTuple):
    """Tokens of a remote page that belong into a local page; a whole page where sizes agree."""

    local_page: int
    remote_page: int
    local_token: int
    remote_token: int
    tokens: int


class PageTail(NamedTuple):
    """Tokens `[first_token, end_token)` of a local page that no remote page covers: zero them."""

    page: int
    first_token: int
    end_token: int


@dataclass(frozen=True)
class GroupMatch:
    """What to do for one group: pages to copy, tails to zero. Both empty on a full hit."""

    copies: tuple[PageCopy, ...] = ()
    zero: tuple[PageTail, ...] = ()


def block_groups(local: EngineGeometry, remote: EngineGeometry) -> list[BlockGroup]:
    """The groups of two engines that have passed `check_compatible`."""
    return [
        BlockGroup(a.kind, a.block_tokens, b.block_tokens, a.pages_per_block, b.pages_per_block)
        for a, b in zip(local.groups, remote.groups, strict=True)
    ]


def match_blocks(
    local: Sequence[Sequence[int]],
    remote: Sequence[Sequence[int]],
    groups: Sequence[BlockGroup],
    *,
    computed: int | Sequence[int] | None = None,
) -> list[GroupMatch]:
    """Matches the block lists of one request, group by group.

    * State: the last block of each list, the running state. Earlier ones are placeholders: either
      list may be clipped to its last block (a local one whose earlier entries are null counts as
      clipped).
    * Attention: by token offset. Blocks of equal size match one to one; of a list shorter than the
      remote one, its blocks are the request's last. Where sizes differ, what the remote blocks do
      not cover of the last local block is reported for zeroing.
    * A list that is one block longer than needed has a block for the last prompt token, which is
      computed again locally: the extra block is dropped.
    * Any group may be empty, alone or with all others, without an effect on the others.

    Args:
        local: Block ids to fill, per group, in order: without those of a prefix hit.
        remote: Block ids of the whole request on the remote engine, per group.
        groups: One per list.
        computed: Tokens in front of the first local block (the prefix hit), one number or one per
            group. None derives it from the ends of the lists, which is right as long as the
            request ends in the same block on both sides; required where a remote attention block
            is larger than a local one, since the end of the lists is then ambiguous.

    Returns:
        One match per group, copies in token order.

    Raises:
        ValueError: Numbers of lists that differ, a list that is too long, a `computed` that is
            missing or no block boundary or leaves a list that ends before the remote one, the null
            block as a state.
    """
    for name, lists in (("local", local), ("remote", remote)):
        if len(lists) != len(groups):
            raise ValueError(f"{name} must have {len(groups)} lists of blocks, got {len(lists)}")
    hits: Sequence[int | None] = (
        computed if isinstance(computed, Sequence) else [computed] * len(groups)
    )
    if len(hits) != len(groups):
        raise ValueError(f"computed must have {len(groups)} entries, got {len(hits)}")
    return [
        (_match_state if group.kind == "state" else _match_attention)(i, ours, theirs, group, hit)
        for i, (ours, theirs, group, hit) in enumerate(
            zip(local, remote, groups, hits, strict=True)
        )
    ]


def _match_state(
    i: int, local: Sequence[int], remote: Sequence[int], group: BlockGroup, computed: int | None
) -> GroupMatch:
    if not any(block != NULL_BLOCK for block in local[:-1]):
        local = local[-1:]  # only placeholders before it: says nothing about positions
    local = _drop_extra(i, local, len(remote))
    if not local:
        return GroupMatch()
    for name, blocks in (("local", local), ("remote", remote)):
        if blocks[-1] == NULL_BLOCK:
            raise ValueError(f"{name} group {i} must end in its running state, got the null block")
    return GroupMatch((PageCopy(local[-1], remote[-1], 0, 0, group.local_block_tokens),))


def _match_attention(
    i: int, local: Sequence[int], remote: Sequence[int], group: BlockGroup, computed: int | None
) -> GroupMatch:
    size, remote_size = group.local_block_tokens, group.remote_block_tokens
    covered = len(remote) * remote_size
    needed = -(-covered // size)
    if not local:
        return GroupMatch()
    if computed is None:
        if size % remote_size:
            raise ValueError(
                f"computed must be given where a remote block ({remote_size} tokens in group {i}) "
                f"is no part of a local one ({size}), got None"
            )
        local = _drop_extra(i, local, needed)
        start = (needed - len(local)) * size
    else:
        if computed < 0 or computed % size:
            raise ValueError(
                f"computed must be a multiple of the {size} tokens of a block of group {i}, "
                f"got {computed}"
            )
        start = computed
        local = _drop_extra(i, local, max(0, needed - start // size))
        if covered - start - len(local) * size >= remote_size:
            raise ValueError(
                f"local group {i} must take the last of {len(remote)} remote blocks of "
                f"{remote_size} tokens, got {len(local)} blocks of {size} from token {start}"
            )
    own_page, remote_page = (
        size // group.local_pages_per_block,
        remote_size // group.remote_pages_per_block,
    )
    end = start + len(local) * size
    copies = []
    token = start
    while token < min(end, covered):
        to, own_token = divmod(token - start, own_page)
        source, source_token = divmod(token, remote_page)
        tokens = min(own_page - own_token, remote_page - source_token)
        copies.append(
            PageCopy(
                _page(local, to, group.local_pages_per_block),
                _page(remote, source, group.remote_pages_per_block),
                own_token,
                source_token,
                tokens,
            )
        )
        token += tokens
    zero = []
    while token < end:
        to, own_token = divmod(token - start, own_page)
        zero.append(PageTail(_page(local, to, group.local_pages_per_block), own_token, own_page))
        token += own_page - own_token
    return GroupMatch(tuple(copies), tuple(zero))


def _drop_extra(i: int, local: Sequence[int], needed: int) -> Sequence[int]:
    if len(local) > needed + 1:
        raise ValueError(
            f"local group {i} must have at most {needed} blocks, or one more for the last token, "
            f"got {len(local)}"
        )
    return local[:needed]


def _page(blocks: Sequence[int], page: int, pages_per_block: int) -> int:
    block, part = divmod(page, pages_per_block)
    return blocks[block] * pages_per_block + part
