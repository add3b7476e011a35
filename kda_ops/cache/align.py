"""Checkpoints of states at block boundaries ("align" mode), with speculative decode.

Prefix caching keeps a KDA state only at the end of each block of `block_tokens` tokens. A request
runs in the block at position `running`; with `num_spec` speculative tokens the recurrent state
after token j of a step is in the block at `running + j`, while the conv state in block `running` is
a window over all of them. Two planners, `before_forward` and `after_sampling`, return plans for
`kda_ops.state_copy`. They are tensor operations of static shape: they run on any device without
synchronization, compile, and can be captured in a CUDA graph.

Source: the "align" mode of Mamba states in vLLM. The two source blocks differ on purpose.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kda_ops import config
from kda_ops._checks import (
    INTEGERS,
    check_at_least,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
)


class AlignStep(NamedTuple):
    """The result of a planner.

    Attributes:
        plan: `[R, 4]`, int32: rows `(conv_src, recurrent_src, dst, bias)` for
            `kda_ops.state_copy`; `(-1, -1, 0, 0)` for a request with nothing to copy.
        num_accepted: `[R]`, the new accepted counts.
        running_block: `[R]`, the new position of the running block in each request's list.
    """

    plan: Tensor
    num_accepted: Tensor
    running_block: Tensor


def before_forward(
    block_table: Tensor,
    *,
    num_computed: Tensor,
    num_scheduled: Tensor,
    num_accepted: Tensor,
    running_block: Tensor,
    block_tokens: int,
) -> AlignStep:
    """Plans the moves of states into the blocks of the next forward.

    A request runs in block `cur = ceil((computed + scheduled) / block_tokens) - 1`. If its last
    running block was a different one, the state after its last accepted token is copied: conv rows
    from that block, shifted by `bias = num_accepted - 1`, and the recurrent state from the block
    `bias` positions after it. Its accepted count is then 1. Where nothing is copied the count is
    unchanged, and the forward needs it, for prefills and decodes: `num_accepted` and
    `prefill_num_accepted` of `kda_ops.cache.batch.KDABatch`.

    Args:
        block_table: `[R, blocks]`, int32 or int64: slots of each request in order of position, 0
            for the null block. Has the blocks up to `cur + num_spec`.
        num_computed: `[R]`, integers: tokens included in the state.
        num_scheduled: `[R]`, tokens of the next forward, including speculative ones; 0 for a
            padding row.
        num_accepted: `[R]`, accepted tokens of the last step, at least 1.
        running_block: `[R]`, positions after the last step; `-1` for a request that is new,
            resumed or preempted: then the block of its last computed token is used, without a
            bias, and with nothing computed nothing is copied.
        block_tokens: Tokens between two checkpoints.

    Returns:
        Plan, accepted counts, running blocks. The inputs are not written.

    Raises:
        ValueError: Invalid shapes, dtypes or devices; on the CPU, or with
            `kda_ops.config.check_values`, also a count out of range or a missing block.
    """
    counts = {
        "num_computed": num_computed,
        "num_scheduled": num_scheduled,
        "num_accepted": num_accepted,
        "running_block": running_block,
    }
    _check(block_table, counts, block_tokens)
    known = running_block >= 0
    bias = torch.where(known, num_accepted - 1, 0)
    # floor division: nothing computed gives -1, no source
    last = torch.div(num_computed - 1, block_tokens, rounding_mode="floor")
    previous = torch.where(known, running_block, last)
    current = (num_computed + num_scheduled + (block_tokens - 1)) // block_tokens - 1
    real = num_scheduled > 0
    moves = real & (previous >= 0) & (previous != current)
    plan = _plan(block_table, moves, previous, current, bias)
    return AlignStep(
        plan,
        torch.where(real & (moves | ~known), 1, num_accepted),
        torch.where(real, current, running_block),
    )


def after_sampling(
    block_table: Tensor,
    *,
    num_computed: Tensor,
    num_scheduled: Tensor,
    num_draft: Tensor,
    num_accepted: Tensor,
    running_block: Tensor,
    block_tokens: int,
) -> AlignStep:
    """Plans the checkpoint of a block boundary that accepted speculative tokens have passed.

    With `running = computed + scheduled - draft` tokens in the running block's own state and `new =
    running + accepted - 1` tokens accepted, the boundary is `aligned = new // block_tokens *
    block_tokens`. If it is not before `running`, the state `aligned - running` tokens later is
    copied to the block that ends there. If that is the running block itself, the state has moved in
    place, and the accepted count becomes 1. Without drafts there is nothing to copy.

    Args:
        block_table: As for `before_forward`.
        num_computed: `[R]`, integers: tokens before this step's forward.
        num_scheduled: `[R]`, tokens of this step's forward, including drafts; 0 for padding.
        num_draft: `[R]`, how many of them were drafts.
        num_accepted: `[R]`, accepted tokens of this step, from 1 to `1 + num_draft`.
        running_block: `[R]`, as returned by `before_forward`.
        block_tokens: Tokens between two checkpoints.

    Returns:
        Plan, accepted counts, running blocks (unchanged).

    Raises:
        ValueError: As for `before_forward`.
    """
    counts = {
        "num_computed": num_computed,
        "num_scheduled": num_scheduled,
        "num_draft": num_draft,
        "num_accepted": num_accepted,
        "running_block": running_block,
    }
    _check(block_table, counts, block_tokens)
    running = num_computed + num_scheduled - num_draft
    aligned = (running + num_accepted - 1) // block_tokens * block_tokens
    bias = aligned - running
    target = aligned // block_tokens - 1
    passed = (num_scheduled > 0) & (running_block >= 0) & (bias >= 0)
    in_place = target == running_block
    plan = _plan(block_table, passed & ~(in_place & (bias == 0)), running_block, target, bias)
    return AlignStep(plan, torch.where(passed & in_place, 1, num_accepted), running_block.clone())


def _plan(
    block_table: Tensor, copies: Tensor, source: Tensor, target: Tensor, bias: Tensor
) -> Tensor:
    """Plan rows from positions; `(-1, -1, 0, 0)` where `copies` is false."""
    blocks = block_table.shape[1]
    positions = torch.stack([source, source + bias, target], dim=1)
    if _reads_values(block_table):
        _check_positions(positions, copies, block_table)
    exists = copies & ((positions >= 0) & (positions < blocks)).all(dim=1) & (bias >= 0)
    slots = block_table.gather(1, torch.where(exists[:, None], positions, 0).long())
    sources = torch.where(exists[:, None], slots[:, :2], -1)
    rest = torch.where(exists[:, None], torch.stack([slots[:, 2], bias], dim=1), 0)
    return torch.cat([sources, rest], dim=1).to(torch.int32)


def _reads_values(x: Tensor) -> bool:
    """Values are checked where that needs no synchronization, and never while tracing."""
    if torch.compiler.is_compiling():
        return False
    return config.check_values or x.device.type == "cpu"


def _check(block_table: Tensor, counts: dict[str, Tensor], block_tokens: int) -> None:
    check_at_least("block_tokens", block_tokens, 1)
    check_rank("block_table", block_table, 2)
    check_dtype("block_table", block_table, INTEGERS)
    if block_table.shape[1] < 1:
        raise ValueError(f"block_table must have shape [R, blocks], got {tuple(block_table.shape)}")
    for name, x in counts.items():
        check_shape(name, x, (block_table.shape[0],))
        check_dtype(name, x, INTEGERS)
    check_device(block_table=block_table, **counts)
    if _reads_values(block_table):
        _check_counts(counts)


def _check_counts(counts: dict[str, Tensor]) -> None:
    columns = {name: x.tolist() for name, x in counts.items()}
    for r, scheduled in enumerate(columns["num_scheduled"]):
        row = {name: column[r] for name, column in columns.items()}
        if scheduled == 0:
            continue
        for name, least in (("num_computed", 0), ("num_scheduled", 0), ("num_accepted", 1)):
            if row[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {row[name]} in row {r}")
        if "num_draft" in row:
            if not 0 <= row["num_draft"] < scheduled:
                raise ValueError(
                    f"num_draft must be in [0, {scheduled}), got {row['num_draft']} in row {r}"
                )
            if row["num_accepted"] > 1 + row["num_draft"]:
                raise ValueError(
                    f"num_accepted must be at most {1 + row['num_draft']}, "
                    f"got {row['num_accepted']} in row {r}"
                )


def _check_positions(positions: Tensor, copies: Tensor, block_table: Tensor) -> None:
    table = block_table.tolist()
    for r, (row, copied) in enumerate(zip(positions.tolist(), copies.tolist(), strict=True)):
        for position in row if copied else ():
            if not 0 <= position < len(table[r]) or table[r][position] <= 0:
                raise ValueError(
                    f"block_table must hold a block at position {position} of row {r}, "
                    f"got {table[r]}"
                )
