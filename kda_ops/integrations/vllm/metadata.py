"""vLLM's description of a step, as a `KDABatch`."""

from typing import Any

import torch
from torch import Tensor

from kda_ops.cache.batch import KDABatch

Step = tuple[KDABatch, Tensor | None]
CACHED = "_kda_ops_step"


def batch_of_metadata(metadata: Any) -> Step:
    """The batch that a `GDNAttentionMetadata` of vLLM describes.

    vLLM keeps the offsets and slots of speculative sequences apart from those of all others, of
    which decodes come first. If a step has both kinds, its rows are those of the requests in order;
    then speculative sequences become the batch's decodes, and all others, also those of one token,
    its prefills. Trailing sequences without tokens are padding, on vLLM's null block 0 or, as in
    older versions, on -1.

    Every layer of a step gets the same metadata, so the batch is made once and kept with it. In a
    step that vLLM captures in a CUDA graph, which has decodes only, its tensors are views of those
    that vLLM refills.

    Args:
        metadata: With the fields of vLLM 0.33's `GDNAttentionMetadata`; `num_actual_tokens` at
            least 1.

    Returns:
        The batch, whose `num_tokens` are the metadata's `num_actual_tokens`, and the row of the
        step for each row of the batch, `[num_tokens]`, int64; None if that is the same row.

    Raises:
        ValueError: As for `KDABatch`.
    """
    known = vars(metadata).get(CACHED)
    if known is None:
        known = _mixed_speculative(metadata) or _one_kind(metadata)
        setattr(metadata, CACHED, known)
    return known


def _one_kind(metadata: Any) -> Step:
    """A step in which all sequences are speculative, or none."""
    rows = metadata.num_actual_tokens
    if metadata.spec_sequence_masks is not None:
        state_indices = metadata.spec_state_indices_tensor
        N = decodes = state_indices.shape[0]
        cu_seqlens = metadata.spec_query_start_loc[: N + 1]
        decode_rows, num_accepted = rows, metadata.num_accepted_tokens[:N]
        continues = None
    else:
        cu_seqlens = metadata.non_spec_query_start_loc
        N = cu_seqlens.shape[0] - 1
        state_indices = metadata.non_spec_state_indices_tensor[:N]
        num_accepted, continues = None, metadata.has_initial_state
        # without prefills, padding sequences and rows are counted as decodes
        decodes, decode_rows = metadata.num_decodes, metadata.num_decode_tokens
    if continues is None:
        continues = state_indices.new_ones(N, dtype=torch.bool)
    batch = KDABatch(
        cu_seqlens=cu_seqlens,
        state_indices=state_indices,
        has_initial_state=continues,
        num_accepted=num_accepted,
        num_decodes=decodes,
        num_decode_tokens=decode_rows,
        num_prefills=N - decodes,
        num_prefill_tokens=rows - decode_rows,
        num_tokens=rows,
    )
    return batch, None


def _mixed_speculative(metadata: Any) -> Step | None:
    """A step with speculative sequences and others; None if it is not one."""
    rows = metadata.num_actual_tokens
    if metadata.spec_sequence_masks is None or not (metadata.num_prefills + metadata.num_decodes):
        return None
    table = metadata.spec_state_indices_tensor
    slots = metadata.non_spec_state_indices_tensor
    padded = table.new_zeros(slots.shape[0], table.shape[1])  # prefills use column 0 alone
    padded[:, 0] = slots
    decodes = metadata.spec_query_start_loc
    prefills = metadata.non_spec_query_start_loc
    decode_rows = metadata.num_spec_decode_tokens
    batch = KDABatch(
        cu_seqlens=torch.cat([decodes, prefills[1:] + decode_rows]),
        state_indices=torch.cat([table, padded]),
        has_initial_state=torch.cat(
            [table.new_ones(table.shape[0], dtype=torch.bool), metadata.has_initial_state]
        ),
        num_accepted=metadata.num_accepted_tokens,
        num_decodes=table.shape[0],
        num_decode_tokens=decode_rows,
        num_prefills=slots.shape[0],
        num_prefill_tokens=rows - decode_rows,
        num_tokens=rows,
    )
    order = torch.cat([metadata.spec_token_indx.long(), metadata.non_spec_token_indx.long()])
    return batch, order
