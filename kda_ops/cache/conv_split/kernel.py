"""conv_split as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.tuning import choose


@triton.jit
def conv_split_kernel(
    state_ptr, part_ptr, OUTER, INNER, stride_slot, stride_outer, stride_inner, BLOCK: tl.constexpr
):
    """One program copies BLOCK elements of one slot of one part [slots, OUTER, INNER].

    Grid: slots x blocks of a slot, blocks fastest.
    """
    blocks = tl.cdiv(OUTER * INNER, BLOCK)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < OUTER * INNER
    outer, inner = (i // INNER).to(tl.int64), (i % INNER).to(tl.int64)
    offsets = slot * stride_slot + outer * stride_outer + inner * stride_inner
    x = tl.load(state_ptr + offsets, mask=ok)
    tl.store(part_ptr + slot * OUTER * INNER + i, x, mask=ok)


def launch_conv_split(conv_state: Tensor, sizes: list[int], layout: str) -> list[Tensor]:
    parts = []
    chosen = choose("conv_split", conv_state.device)
    for part in conv_state.split(sizes, dim=2 if layout == "SD" else 1):
        out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        slots, outer, inner = part.shape
        if outer * inner > 0:
            traceable(conv_split_kernel)[(slots * triton.cdiv(outer * inner, chosen["BLOCK"]),)](
                part, out, outer, inner, *part.stride(), **chosen
            )
        parts.append(out)
    return parts
