"""Matches the local and remote pages of a request, with prefix caching on the local side.

Each side has one list of block ids per group, by position: entry i of the remote list holds tokens
from `i * remote_block_tokens`. The local list may lack blocks at its front: those of a prefix hit.
Pure functions of data; the bytes of a page are up to `kda_ops.transfer.plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kda_ops.transfer.geometry import EngineGeometry

NULL_BLOCK = 0


@dataclass(frozen=True)
class BlockGroup:
    """The blocks of one group of layers.

    Attributes:
        kind: `"state"` (a block is one running state) or `"attention"`.
        local_block_tokens: Tokens of a local block.
        remote_block_tokens: Tokens of a remote block.
        local_pages_per_block: Pages that one local block id stands for: block b is pages
            `b * ratio` to `b * ratio + ratio - 1`. States never expand.
        remote_pages_per_block: The same for the remote engine, whose ratio may differ.
        num_spec: Speculative tokens per step: a state list may end in as many blocks after the
            running one.

    Raises:
        ValueError: An unknown kind, a number below 1, a ratio that does not divide its block.
    """

    kind: str
    local_block_tokens: int
    remote_block_tokens: int
    local_pages_per_block: int = 1
    remote_pages_per_block: int = 1
    num_spec: int = 0

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
        if self.num_spec < 0 or (self.num_spec and self.kind == "attention"):
            raise ValueError(
                f"num_spec must be at least 0, and 0 for attention, got {self.num_spec}"
            )


class PageCopy(NamedTuple):
    """Tokens of a remote page that go into a local page; a whole page if sizes agree."""

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
        BlockGroup(
            a.kind, a.block_tokens, b.block_tokens, a.pages_per_block, b.pages_per_block, a.num_spec
        )
        for a, b in zip(local.groups, remote.groups, strict=True)
    ]


def match_blocks(
    local: Sequence[Sequence[int]],
    remote: Sequence[Sequence[int]],
    groups: Sequence[BlockGroup],
    *,
    computed: int | Sequence[int] | None = None,
    local_running: int | Sequence[int | None] | None = None,
    remote_running: int | Sequence[int | None] | None = None,
) -> list[GroupMatch]:
    """Matches the block lists of one request, group by group.

    * State: the running block of each list, which includes all accepted tokens. `local_running` or
      `remote_running` names it; else it is the last one, and earlier ones are placeholders: either
      list may be clipped to its last block. Blocks after a named one (speculative tokens of a step)
      and before it (checkpoints) are left alone. A list of several blocks is ambiguous without a
      name if the group has speculative tokens, or if null blocks show that its placeholders are
      null.
    * Attention: by token offset. Blocks of equal size match one to one; a list shorter than the
      remote one has the request's last blocks. Where sizes differ, the part of the last local block
      that the remote blocks do not cover is reported for zeroing.
    * A list that is one block longer than needed has a block for the last prompt token, which is
      recomputed locally: the extra block is dropped.
    * Any group may be empty without affecting the others.

    Args:
        local: Block ids to fill, per group, in order, without those of a prefix hit.
        remote: Block ids of the whole request on the remote engine, per group.
        groups: One per list.
        computed: Tokens before the first local block (the prefix hit), one number or one per group.
            None derives it from the ends of the lists, which is right if the request ends in the
            same block on both sides; required if a remote attention block is larger than a local
            one, since the end of the lists is then ambiguous.
        local_running: Index of the running block in a local list of states, one number for all
            lists of states or one entry per group (None for attention).
        remote_running: The same for the remote lists.

    Returns:
        One match per group, copies in token order.

    Raises:
        ValueError: Different numbers of lists, a list that is too long, a `computed` that is
            missing, not a block boundary or leaves a list that ends before the remote one, the null
            block as a state, a state list with an ambiguous running block.
    """
    for name, lists in (("local", local), ("remote", remote)):
        if len(lists) != len(groups):
            raise ValueError(f"{name} must have {len(groups)} lists of blocks, got {len(lists)}")
    hits: Sequence[int | None] = (
        computed if isinstance(computed, Sequence) else [computed] * len(groups)
    )
    if len(hits) != len(groups):
        raise ValueError(f"computed must have {len(groups)} entries, got {len(hits)}")
    kinds = [group.kind for group in groups]
    to, at = (
        _per_state(_argument(side), running, kinds)
        for side, running in (("local", local_running), ("remote", remote_running))
    )
    return [
        _match_state(i, ours, theirs, group, to[i], at[i])
        if group.kind == "state"
        else _match_attention(i, ours, theirs, group, hit)
        for i, (ours, theirs, group, hit) in enumerate(
            zip(local, remote, groups, hits, strict=True)
        )
    ]


def held_blocks(
    side: str,
    blocks: Sequence[Sequence[int]],
    geometry: EngineGeometry,
    running: int | Sequence[int | None] | None = None,
) -> list[list[int]]:
    """The blocks of a request that a reader may need: of a state only the running one.

    Args:
        side: The owner of the blocks, for errors: `"remote"`, or `"offered"`.
        blocks: Per group.
        geometry: Geometry of their engine.
        running: See `match_blocks`.

    Raises:
        ValueError: A wrong number of lists, or a state list that `match_blocks` rejects.
    """
    groups = geometry.groups
    if len(blocks) != len(groups):
        raise ValueError(f"{side} must have {len(groups)} lists of blocks, got {len(blocks)}")
    indices = _per_state(_argument(side), running, [group.kind for group in groups])
    return [
        [own[_running_index(side, i, own, group.num_spec, indices[i])]]
        if group.kind == "state" and own
        else list(own)
        for i, (own, group) in enumerate(zip(blocks, groups, strict=True))
    ]


def _argument(side: str) -> str:
    return "running" if side == "offered" else f"{side}_running"


def _per_state(
    name: str, running: int | Sequence[int | None] | None, kinds: Sequence[str]
) -> Sequence[int | None]:
    """One index per group, None where there is none."""
    if not isinstance(running, Sequence):
        return [running if kind == "state" else None for kind in kinds]
    if len(running) != len(kinds):
        raise ValueError(f"{name} must have {len(kinds)} entries, got {len(running)}")
    for i, (index, kind) in enumerate(zip(running, kinds, strict=True)):
        if index is not None and kind != "state":
            raise ValueError(f"{name} must be None for group {i}, which is {kind}, got {index}")
    return running


def _running_index(
    side: str, i: int, blocks: Sequence[int], num_spec: int, running: int | None
) -> int:
    """Index of the running block in a nonempty state list."""
    if running is not None and not 0 <= running < len(blocks):
        raise ValueError(
            f"{_argument(side)} must be in [0, {len(blocks)}) for group {i}, got {running}"
        )
    found = len(blocks) - 1 if running is None else running
    if blocks[found] == NULL_BLOCK:
        place = "end in" if running is None else f"have at {running}"
        raise ValueError(f"{side} group {i} must {place} its running state, got the null block")
    null = blocks.count(NULL_BLOCK)
    if running is None and len(blocks) - null > 1 and (num_spec or null):
        raise ValueError(
            f"{_argument(side)} must name the running block of group {i}, since others may be "
            f"checkpoints or of speculative tokens, got None for {list(blocks)}"
        )
    return found


def _match_state(
    i: int,
    local: Sequence[int],
    remote: Sequence[int],
    group: BlockGroup,
    local_running: int | None,
    remote_running: int | None,
) -> GroupMatch:
    if not local:
        return GroupMatch()
    last = -1
    if remote or remote_running is not None:
        last = _running_index("remote", i, remote, group.num_spec, remote_running)
    # a lone block, or null ones before it, say nothing about positions
    positional = local_running is None and NULL_BLOCK not in local and last != 0
    if last < 0:
        _drop_extra(i, local if positional else local[-1:], 0)
        return GroupMatch()
    to = _running_index("local", i, local, group.num_spec, local_running)
    if positional:
        to = len(_drop_extra(i, local, last + 1)) - 1
    return GroupMatch((PageCopy(local[to], remote[last], 0, 0, group.local_block_tokens),))


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
