"""Checks of `KDABatch`. Every error names the field, what was expected and what was passed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kda_ops._checks import (
    INTEGERS,
    check_accepted_values,
    check_at_least,
    check_chunk_indices_shape,
    check_cu_seqlens_shape,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_integer,
    check_not_negative,
    check_shape,
    check_unshared_slots,
)
from kda_ops._numerics import CHUNK
from kda_ops.blocks import Blocks, check_block_values, check_blocks
from kda_ops.varlen import check_chunk_indices_values

if TYPE_CHECKING:
    from kda_ops.cache.batch import KDABatch


def check_counts(batch: "KDABatch") -> None:
    counts = ("num_decodes", "num_decode_tokens", "num_prefills", "num_prefill_tokens")
    for name in (*counts, "num_tokens"):
        check_integer(name, getattr(batch, name))
    for name in counts:
        check_not_negative(name, getattr(batch, name))
    if batch.num_decodes + batch.num_prefills == 0:
        raise ValueError("num_decodes + num_prefills must be at least 1, got 0")
    rows = batch.num_decode_tokens + batch.num_prefill_tokens
    check_at_least("num_tokens", batch.num_tokens, rows)


def check_tensors(batch: "KDABatch") -> None:
    N = batch.num_decodes + batch.num_prefills
    check_device(
        cu_seqlens=batch.cu_seqlens,
        state_indices=batch.state_indices,
        has_initial_state=batch.has_initial_state,
        num_accepted=batch.num_accepted,
        prefill_num_accepted=batch.prefill_num_accepted,
        prefill_cu_seqlens=batch.prefill_cu_seqlens,
        chunk_indices=batch.chunk_indices,
    )
    tables = (batch.block_table, batch.context_lens, batch.block_tokens)
    check_blocks("state_indices", batch.state_indices, batch.num_prefills, *tables)
    check_cu_seqlens_shape(batch.cu_seqlens)
    check_shape("cu_seqlens", batch.cu_seqlens, (N + 1,))
    check_dtype("state_indices", batch.state_indices, INTEGERS)
    if (
        batch.state_indices.dim() not in (1, 2)
        or batch.state_indices.shape[0] != N
        or batch.state_indices.numel() == 0
    ):
        raise ValueError(
            f"state_indices must have shape [{N}] or [{N}, 1 + num_spec], "
            f"got {tuple(batch.state_indices.shape)}"
        )
    check_dtype("has_initial_state", batch.has_initial_state, (torch.bool,))
    check_shape("has_initial_state", batch.has_initial_state, (N,))
    for name, sequences in accepted_counts(batch).items():
        check_dtype(name, getattr(batch, name), INTEGERS)
        check_shape(name, getattr(batch, name), (len(sequences),))
        if batch.state_indices.dim() == 1:
            raise ValueError(
                f"{name} must come with state_indices of shape [N, 1 + num_spec], "
                f"got {tuple(batch.state_indices.shape)}"
            )
    if batch.prefill_cu_seqlens is not None:
        check_dtype("prefill_cu_seqlens", batch.prefill_cu_seqlens, INTEGERS)
        check_shape("prefill_cu_seqlens", batch.prefill_cu_seqlens, (batch.num_prefills + 1,))
    if batch.chunk_indices is not None:
        check_chunk_indices_shape(
            batch.chunk_indices, batch.num_prefills, batch.num_prefill_rows, CHUNK
        )


def check_batch_values(batch: "KDABatch") -> None:
    """Reads the contents of the tensors."""
    rows = batch.num_decode_tokens + batch.num_prefill_tokens
    check_cu_seqlens_values(batch.cu_seqlens, rows)
    start = int(batch.cu_seqlens[batch.num_decodes])
    if batch.num_prefills and start != batch.num_decode_tokens:
        raise ValueError(
            f"cu_seqlens must start the prefills at num_decode_tokens = "
            f"{batch.num_decode_tokens}, got {start}"
        )
    offsets = batch.cu_seqlens[batch.num_decodes :] - batch.num_decode_tokens
    given = None if batch.prefill_cu_seqlens is None else batch.prefill_cu_seqlens.tolist()
    if batch.num_prefills and given not in (None, offsets.tolist()):
        raise ValueError(
            "prefill_cu_seqlens must be the prefills' part of cu_seqlens, "
            f"{offsets.tolist()}, got {given}"
        )
    if batch.num_prefills and batch.chunk_indices is not None:
        check_chunk_indices_values(batch.chunk_indices, offsets, batch.num_prefill_rows, CHUNK)
    table = batch.state_indices.reshape(len(batch.state_indices), -1)
    check_unshared_slots(table)
    most = table.shape[1]
    lengths = batch.cu_seqlens[: batch.num_decodes + 1].diff()
    if (lengths > most).any():
        raise ValueError(
            f"cu_seqlens must give each decode at most {most} tokens, "
            "one per column of state_indices, "
            f"got {int(lengths.max())}"
        )
    for name, sequences in accepted_counts(batch).items():
        count = getattr(batch, name)
        ignored = (table[sequences.start : sequences.stop] <= 0).all(dim=1)
        if name == "prefill_num_accepted":
            ignored |= ~batch.has_initial_state[batch.num_decodes :]
        check_accepted_values(name, count, most, ignored)


def check_batch_blocks(batch: "KDABatch", num_slots: int) -> None:
    """Contents of the block table, for states of so many pages."""
    if batch.block_table is None or batch.block_tokens is None or batch.prefill_cu_seqlens is None:
        return
    blocks = Blocks(batch.block_table, batch.context_lens, batch.block_tokens)
    table = batch.state_indices.reshape(len(batch.state_indices), -1)
    own = table[batch.num_decodes :, 0]
    others = [*table[: batch.num_decodes].flatten().tolist(), *table[:, 1:].flatten().tolist()]
    check_block_values(num_slots, own, batch.prefill_cu_seqlens.long(), blocks, others)


def accepted_counts(batch: "KDABatch") -> dict[str, range]:
    """The accepted counts that are given, and their sequences."""
    N = batch.num_decodes + batch.num_prefills
    found = {
        "num_accepted": range(batch.num_decodes),
        "prefill_num_accepted": range(batch.num_decodes, N),
    }
    return {name: n for name, n in found.items() if getattr(batch, name) is not None}


def integers(name: str, values: Tensor | Sequence, device: torch.device | str) -> Tensor:
    """A tensor of integers, also from lists."""
    if isinstance(values, Tensor):
        return values.to(device)
    try:
        found = torch.tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be lists of integers, got {values!r}") from error
    if found.numel():  # an empty list has no dtype
        check_dtype(name, found, INTEGERS)
    return found.to(torch.int32)
