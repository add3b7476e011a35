"""Matching of block lists under prefix caching."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_ops.transfer.blocks import (
    BlockGroup,
    GroupMatch,
    PageCopy,
    PageTail,
    block_groups,
    held_blocks,
    match_blocks,
)
from tests.transfer.test_transfer_plan import hybrid

STATE, KV = BlockGroup("state", 16, 16), BlockGroup("attention", 16, 16)


def pages(match: GroupMatch) -> list[tuple[int, int]]:
    return [(copy.local_page, copy.remote_page) for copy in match.copies]


def test_equal_blocks_match_one_to_one_and_a_state_only_in_its_last_block() -> None:
    state, kv = match_blocks([[0, 0, 5], [7, 8, 9]], [[1, 2, 3], [4, 5, 6]], [STATE, KV])
    assert state == GroupMatch((PageCopy(5, 3, 0, 0, 16),))
    assert pages(kv) == [(7, 4), (8, 5), (9, 6)]
    assert kv.zero == ()


def test_a_prefix_hit_reads_the_last_blocks() -> None:
    state, kv = match_blocks([[5], [9]], [[1, 2, 3], [4, 5, 6]], [STATE, KV])
    assert pages(state) == [(5, 3)]
    assert pages(kv) == [(9, 6)]


def test_any_group_may_be_empty_alone() -> None:
    remote = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    groups = [STATE, KV, KV]
    for i in range(3):
        local = [[11], [12], [13]]
        local[i] = []
        found = [pages(m) for m in match_blocks(local, remote, groups)]
        expected = [[(11, 3)], [(12, 6)], [(13, 9)]]
        expected[i] = []
        assert found == expected
    assert match_blocks([[], [], []], remote, groups) == [GroupMatch()] * 3
    assert match_blocks([[], [], []], [[], [], []], groups) == [GroupMatch()] * 3


def test_the_block_of_a_recomputed_last_token_is_dropped() -> None:
    state, kv = match_blocks([[5, 6, 7], [7, 8, 9]], [[3, 4], [4, 5]], [STATE, KV])
    assert pages(state) == [(6, 4)]
    assert pages(kv) == [(7, 4), (8, 5)]
    assert pages(match_blocks([[7]], [[]], [KV])[0]) == []


def test_an_extra_block_after_a_hit_needs_the_length_of_the_hit() -> None:
    """Local blocks 1 and 2 of a request with 2 remote blocks: the ends of the lists do not meet."""
    assert pages(match_blocks([[8, 9]], [[4, 5]], [KV])[0]) == [(8, 4), (9, 5)]
    assert pages(match_blocks([[8, 9]], [[4, 5]], [KV], computed=16)[0]) == [(8, 5)]


def test_a_clipped_state_list_says_nothing_about_positions() -> None:
    assert pages(match_blocks([[0, 0, 0, 5]], [[9]], [STATE])[0]) == [(5, 9)]
    assert pages(match_blocks([[5]], [[0, 0, 9]], [STATE])[0]) == [(5, 9)]


@pytest.mark.parametrize("local", [[5], [3, 5], [2, 3, 5], [0, 5], [0, 0, 5]])
def test_a_remote_list_may_be_clipped_to_its_last_block(local: list[int]) -> None:
    assert pages(match_blocks([local], [[7]], [STATE])[0]) == [(5, 7)]


def test_of_one_remote_block_the_running_one_is_named_before_an_extra_one() -> None:
    """One block may be the whole list or its clipped end."""
    assert pages(match_blocks([[5, 6]], [[3]], [STATE], local_running=0)[0]) == [(5, 3)]


def test_speculative_blocks_behind_the_running_one_are_left_alone() -> None:
    local, remote = [[0, 0, 5, 6, 8], [1, 2, 3]], [[0, 0, 9, 10, 11], [4, 5, 6]]
    options = {"local_running": 2, "remote_running": [2, None]}
    state, kv = match_blocks(local, remote, [STATE, KV], **options)
    assert state == GroupMatch((PageCopy(5, 9, 0, 0, 16),))
    assert pages(kv) == [(1, 4), (2, 5), (3, 6)]
    # either list clipped, at its front or to the running block
    for ours, to in (([5, 6, 8], 0), ([5], None), ([0, 0, 5], None)):
        for theirs, at in (([9, 10, 11], 0), ([9], None), ([0, 0, 9], None)):
            (found,) = match_blocks([ours], [theirs], [STATE], local_running=to, remote_running=at)
            assert pages(found) == [(5, 9)]
    # with a hit there is nothing to read, however the remote list ends
    assert match_blocks([[]], [remote[0]], [STATE], remote_running=2) == [GroupMatch()]


SPECULATING = BlockGroup("state", 16, 16, num_spec=2)


@pytest.mark.parametrize(
    ("local", "remote", "group", "side"),
    [
        ([0, 0, 5, 6, 8], [0, 0, 9, 10, 11], STATE, "local|remote"),
        ([0, 0, 5, 6, 8], [9], STATE, "local"),
        ([5], [0, 0, 9, 10, 11], STATE, "remote"),
        ([5], [7, 0, 9], STATE, "remote"),
        ([0, 5, 6], [0, 9], STATE, "local"),
        ([5, 6, 8], [9], SPECULATING, "local"),
        ([5], [9, 10, 11], SPECULATING, "remote"),
        ([5, 6], [9, 10], SPECULATING, "local|remote"),
    ],
)
def test_an_ambiguous_state_list_is_rejected(
    local: list[int], remote: list[int], group: BlockGroup, side: str
) -> None:
    with pytest.raises(ValueError, match=rf"({side})_running must name the running block of group"):
        match_blocks([local], [remote], [group])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_running_block_is_found_or_the_list_rejected(data: st.DataObject) -> None:
    """Lists as schedulers make them. What is named is found; what is not named is never mistaken,
    but for an extra block where a list is, or may be, clipped.
    """
    draw = data.draw
    num_spec = draw(st.integers(0, 2))
    count = draw(st.integers(1, 5))  # positions up to the running block
    group = BlockGroup("state", 16, 16, num_spec=num_spec)

    def blocks(first: int, behind: int) -> tuple[list[int], int]:
        """A list, and where its running block is."""
        ids = list(range(first, first + count + behind))
        style = draw(st.sampled_from(["checkpoints", "null", "some null", "clipped"]))
        if style == "null":
            ids[: count - 1] = [0] * (count - 1)
        elif style == "some null":
            ids[: count - 1] = [i * draw(st.integers(0, 1)) for i in ids[: count - 1]]
        clipped = count - 1 if style == "clipped" else 0
        return ids[clipped:], count - 1 - clipped

    extra = draw(st.integers(0, 1)) if num_spec == 0 else 0
    local, to = blocks(10, draw(st.integers(0, num_spec)) + extra)
    remote, at = blocks(50, draw(st.integers(0, num_spec)))
    expected = [(local[to], remote[at])]
    named = match_blocks([local], [remote], [group], local_running=to, remote_running=at)
    assert pages(named[0]) == expected
    if extra and (len(remote) == 1 or len(local) < count + extra):
        return
    lists = (local, remote)
    several = any(sum(block > 0 for block in blocks) > 1 for blocks in lists)
    if several and (num_spec or 0 in local + remote):
        with contextlib.suppress(ValueError):
            assert pages(match_blocks([local], [remote], [group])[0]) == expected
    else:
        assert pages(match_blocks([local], [remote], [group])[0]) == expected


def test_held_blocks_of_a_request() -> None:
    geometry = hybrid(kda_num_spec=2)
    blocks = [[0, 0, 5, 6, 8], [1, 2]]
    assert held_blocks("offered", blocks, geometry, 2) == [[5], [1, 2]]
    assert held_blocks("offered", blocks, geometry, [2, None]) == [[5], [1, 2]]
    assert held_blocks("remote", [[0, 5], []], geometry) == [[5], []]
    assert held_blocks("remote", [[], []], geometry) == [[], []]
    for side, argument in (("offered", "running"), ("remote", "remote_running")):
        with pytest.raises(ValueError, match=rf"^{argument} must name .* got None for \[0, 0, 5"):
            held_blocks(side, blocks, geometry)
        with pytest.raises(ValueError, match=rf"^{argument} must have 2 entries, got 1"):
            held_blocks(side, blocks, geometry, [2])
    with pytest.raises(ValueError, match="offered must have 2 lists of blocks, got 1"):
        held_blocks("offered", blocks[:1], geometry)


@pytest.mark.parametrize(
    ("running", "match"),
    [
        ({"local_running": 3}, r"local_running must be in \[0, 3\) for group 0, got 3"),
        ({"remote_running": -1}, r"remote_running must be in \[0, 2\) for group 0, got -1"),
        ({"local_running": 0}, "local group 0 must have at 0 its running state, got the null"),
        ({"local_running": [2]}, "local_running must have 2 entries, got 1"),
        ({"remote_running": [1, 0]}, "remote_running must be None for group 1, .*, got 0"),
    ],
)
def test_wrong_running_blocks(running: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        match_blocks([[0, 5, 6], [1]], [[8, 9], [2]], [STATE, KV], **running)


@pytest.mark.parametrize(
    ("local", "remote", "zero"),
    [
        ([7, 8], [1, 2, 3, 4], []),
        ([8], [1, 2, 3, 4], []),
        ([7, 8], [1, 2, 3], [PageTail(8, 16, 32)]),
        ([8], [1, 2, 3], [PageTail(8, 16, 32)]),
        ([7, 8, 9], [1, 2, 3], [PageTail(8, 16, 32)]),
    ],
)
def test_smaller_remote_blocks_fill_parts_and_the_rest_is_zeroed(
    local: list[int], remote: list[int], zero: list[PageTail]
) -> None:
    match = match_blocks([local], [remote], [BlockGroup("attention", 32, 16)])[0]
    every = [PageCopy(7 + i // 2, 1 + i, i % 2 * 16, 0, 16) for i in range(len(remote))]
    assert list(match.copies) == [copy for copy in every if copy.local_page in local]
    assert list(match.zero) == zero


def test_larger_remote_blocks_are_read_in_parts() -> None:
    group = BlockGroup("attention", 16, 32)
    match = match_blocks([[7, 8, 9]], [[1, 2]], [group], computed=16)[0]
    assert match.copies == (
        PageCopy(7, 1, 0, 16, 16),
        PageCopy(8, 2, 0, 0, 16),
        PageCopy(9, 2, 0, 16, 16),
    )
    # the request may end in the first half of the last remote block
    half = match_blocks([[7, 8]], [[1, 2]], [group], computed=16)[0]
    assert half.copies == match.copies[:2]
    assert match.zero == ()
    with pytest.raises(ValueError, match=r"computed must be given where a remote block \(32"):
        match_blocks([[7, 8, 9]], [[1, 2, 3]], [group])


def test_each_side_expands_by_its_own_ratio_and_states_never() -> None:
    groups = [STATE, BlockGroup("attention", 32, 32, 2, 4)]
    state, kv = match_blocks([[5], [3]], [[4], [2]], groups)
    assert pages(state) == [(5, 4)]
    assert kv.copies == (
        PageCopy(6, 8, 0, 0, 8),
        PageCopy(6, 9, 8, 0, 8),
        PageCopy(7, 10, 0, 0, 8),
        PageCopy(7, 11, 8, 0, 8),
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_attention_matches_token_by_token(data: st.DataObject) -> None:
    """Copies executed token by token give every local block its tokens."""
    sizes = st.sampled_from([2, 3, 4, 6, 8, 12])
    size, remote_size = data.draw(sizes), data.draw(sizes)
    ratio = data.draw(st.sampled_from([r for r in (1, 2, 3) if size % r == 0]))
    remote_ratio = data.draw(st.sampled_from([r for r in (1, 2, 3) if remote_size % r == 0]))
    tokens = data.draw(st.integers(1, 60))
    blocks, remote_blocks = -(-tokens // size), -(-tokens // remote_size)
    hit = data.draw(st.integers(0, blocks))
    extra = data.draw(st.booleans())
    told = data.draw(st.booleans()) or size % remote_size != 0 or (extra and hit > 0)
    local = data.draw(st.permutations(range(1, 80)))[: blocks - hit + extra]
    remote = data.draw(st.permutations(range(1, 80)))[:remote_blocks]
    group = BlockGroup("attention", size, remote_size, ratio, remote_ratio)
    # tokens of remote pages, and what lands where
    held = {
        (
            block * remote_ratio + t // (remote_size // remote_ratio),
            t % (remote_size // remote_ratio),
        ): i * remote_size + t
        for i, block in enumerate(remote)
        for t in range(remote_size)
    }
    match = match_blocks([local], [remote], [group], computed=hit * size if told else None)[0]
    written: dict[tuple[int, int], int | None] = {}
    for copy in match.copies:
        for t in range(copy.tokens):
            place = (copy.local_page, copy.local_token + t)
            assert place not in written
            written[place] = held[copy.remote_page, copy.remote_token + t]
    for tail in match.zero:
        for t in range(tail.first_token, tail.end_token):
            assert (tail.page, t) not in written
            written[tail.page, t] = None
    page = size // ratio
    covered = remote_blocks * remote_size
    expected = {
        (block * ratio + t // page, t % page): token if token < covered else None
        for i, block in enumerate(local[: blocks - hit])
        for t in range(size)
        for token in [(hit + i) * size + t]
    }
    if extra and covered > blocks * size:
        # the last remote block reaches into the extra local block: its tokens come along
        expected |= {
            (block * ratio + t // page, t % page): token if token < covered else None
            for block in local[blocks - hit :]
            for t in range(size)
            for token in [blocks * size + t]
        }
    assert written == expected


@pytest.mark.parametrize(
    ("local", "remote", "groups", "computed", "match"),
    [
        ([[1]], [[1], [2]], [STATE, KV], None, "local must have 2 lists of blocks, got 1"),
        ([[1], [2]], [[1]], [STATE, KV], None, "remote must have 2 lists of blocks, got 1"),
        ([[1, 2, 3, 4]], [[1, 2]], [KV], None, "at most 2 blocks, or one more .*, got 4"),
        ([[1, 2, 3, 4]], [[1, 2]], [STATE], None, "at most 2 blocks, or one more .*, got 4"),
        ([[1, 2, 3]], [[1, 2]], [KV], 16, "at most 1 blocks, or one more .*, got 3"),
        ([[1]], [[1]], [KV], 8, "computed must be a multiple of the 16 tokens .* got 8"),
        ([[1]], [[1]], [KV], -16, "computed must be a multiple of the 16 tokens .* got -16"),
        ([[1]], [[1]], [KV], [0, 0], "computed must have 1 entries, got 2"),
        ([[7]], [[4, 5]], [KV], 0, "must take the last of 2 .* got 1 blocks of 16 from token 0"),
        ([[7]], [[4, 5]], [BlockGroup("attention", 8, 16)], 8, "must take the last of 2 remote"),
        ([[0]], [[1]], [STATE], None, "local group 0 must end in its running state"),
        ([[1]], [[1, 0]], [STATE], None, "remote group 0 must end in its running state"),
    ],
)
def test_errors(
    local: list[list[int]],
    remote: list[list[int]],
    groups: list[BlockGroup],
    computed: int | list[int] | None,
    match: str,
) -> None:
    with pytest.raises(ValueError, match=match):
        match_blocks(local, remote, groups, computed=computed)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("ring", 16, 16), "kind must be state or attention, got 'ring'"),
        (("attention", 0, 16), "divide local_block_tokens = 0, got 1"),
        (("attention", 16, 16, 3), "local_pages_per_block .* divide .* 16, got 3"),
        (("attention", 16, 12, 1, 5), "remote_pages_per_block .* divide .* 12, got 5"),
        (("state", 16, 16, 1, 1, -1), "num_spec must be at least 0, .* got -1"),
        (("attention", 16, 16, 1, 1, 1), "num_spec must be .* 0 for attention, got 1"),
        (("state", 16, 16, 2), "local_pages_per_block of a state must be 1, got 2"),
    ],
)
def test_impossible_groups(arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BlockGroup(*arguments)


def test_groups_of_two_engines() -> None:
    found = block_groups(hybrid(), hybrid(4, kv_block_tokens=32, kv_pages_per_block=2))
    assert found == [BlockGroup("state", 16, 16, num_spec=1), BlockGroup("attention", 16, 32, 1, 2)]
