"""The state copy as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import traceable
from kda_ops.tuning import choose


@triton.jit
def as_integers(pointer, BITS: tl.constexpr):
    """The pointer as one to integers of that size: copying bits works for any dtype on any GPU."""
    if BITS == 8:
        return pointer.to(tl.pointer_type(tl.int8))
    elif BITS == 16:
        return pointer.to(tl.pointer_type(tl.int16))
    elif BITS == 32:
        return pointer.to(tl.pointer_type(tl.int32))
    else:
        return pointer.to(tl.pointer_type(tl.int64))


@triton.jit
def state_copy_kernel(
    conv_ptr, recurrent_ptr, plan_ptr,
    requests, slots,
    plan_row, plan_column, conv_layer, conv_slot, conv_row, recurrent_layer, recurrent_slot,
    LAYERS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, ELEMENTS: tl.constexpr,
    MAX_BIAS: tl.constexpr, DIM_FIRST: tl.constexpr, CONV_BITS: tl.constexpr,
    RECURRENT_BITS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies one block of one request's conv or recurrent state in one layer.

    A conv block is COLUMNS whole columns with all L rows: a shift of a slot in place stays inside
    the program, which reads everything, synchronizes its threads, then writes. A recurrent block is
    BLOCK contiguous elements. Elements are copied as integers of their size. Grid: requests x
    layers x (conv blocks, then recurrent blocks), flattened, blocks fastest. A program whose slots
    or bias are out of range does nothing.
    """
    CONV_BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = CONV_BLOCKS + (ELEMENTS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % BLOCKS
    layer = (program // BLOCKS % LAYERS).to(tl.int64)
    request = (program // (BLOCKS * LAYERS)).to(tl.int64)
    is_conv = block < CONV_BLOCKS
    if request < requests:
        row = plan_ptr + request * plan_row
        src = tl.load(row + tl.where(is_conv, 0, 1) * plan_column).to(tl.int64)
        dst = tl.load(row + 2 * plan_column).to(tl.int64)
        bias = tl.load(row + 3 * plan_column).to(tl.int64)
        live = (src >= 0) & (src < slots) & (dst > 0) & (dst < slots)
        live = live & (bias >= 0) & (bias <= MAX_BIAS)
        if live & is_conv & ((src != dst) | (bias != 0)):
            conv = as_integers(conv_ptr, CONV_BITS)
            source = conv + layer * conv_layer + src * conv_slot
            target = conv + layer * conv_layer + dst * conv_slot
            if DIM_FIRST:
                # [D, L] is flat: element i comes from i + bias unless its row is in the tail
                i = tl.arange(0, BLOCK_COLUMNS * BLOCK_L)
                at = block * (COLUMNS * L) + i
                ok = (i < COLUMNS * L) & (at < D * L)
                if bias == 0:
                    x = tl.load(source + at, mask=ok)
                    tl.store(target + at, x, mask=ok)
                else:
                    ok = ok & (i % L + bias < L)
                    x = tl.load(source + at + bias, mask=ok)
                    tl.debug_barrier()
                    tl.store(target + at, x, mask=ok)
            else:
                i_d = block * COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
                i_l = tl.arange(0, BLOCK_L)[:, None]
                ok = (i_d < D) & (i_l + bias < L)
                at = i_l.to(tl.int64) * conv_row + i_d
                x = tl.load(source + bias * conv_row + at, mask=ok)
                tl.debug_barrier()
                tl.store(target + at, x, mask=ok)
        if live & (block >= CONV_BLOCKS) & (src != dst):
            recurrent = as_integers(recurrent_ptr, RECURRENT_BITS)
            at = (block - CONV_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            layer_ptr = recurrent + layer * recurrent_layer
            x = tl.load(layer_ptr + src * recurrent_slot + at, mask=at < ELEMENTS)
            tl.store(layer_ptr + dst * recurrent_slot + at, x, mask=at < ELEMENTS)


def launch_state_copy(
    conv: Tensor, recurrent: Tensor, plan: Tensor, layout: str, max_bias: int
) -> None:
    layers = int(conv.shape[0]) if conv.dim() == 4 else 1
    dim_first = layout == "DS"
    L, D = (int(n) for n in (conv.shape[:-3:-1] if dim_first else conv.shape[-2:]))
    elements = int(recurrent.shape[-3] * recurrent.shape[-2] * recurrent.shape[-1])
    chosen = choose(
        "state_copy", conv.device, L=L, D=D, conv=conv.dtype, recurrent=recurrent.dtype,
        layout=layout,
    )  # fmt: skip
    block_bytes = chosen["BYTES"]
    block_l = triton.next_power_of_2(L)
    block_columns = triton.next_power_of_2(
        min(max(D, 1), max(16, block_bytes // 2 // (conv.element_size() * block_l)))
    )
    columns = block_columns
    if dim_first:  # no lane idles on the padding of L, and every block starts at an aligned column
        columns = max(1, block_columns * block_l // L // 16 * 16)
    block = block_bytes // recurrent.element_size()
    block = min(block, triton.next_power_of_2(max(elements, 1)))
    blocks = triton.cdiv(D, columns) + triton.cdiv(elements, block)
    # a plan without requests still launches: CUDA has no empty grid
    grid = (torch.sym_max(plan.shape[0], 1) * (layers * blocks),)
    traceable(state_copy_kernel)[grid](
        conv, recurrent, plan, plan.shape[0], conv.shape[-3], *plan.stride(),
        conv.stride(0) if conv.dim() == 4 else 0, conv.stride(-3), conv.stride(-2),
        recurrent.stride(0) if recurrent.dim() == 5 else 0, recurrent.stride(-4),
        LAYERS=layers, L=L, D=D, ELEMENTS=elements, MAX_BIAS=max_bias, DIM_FIRST=dim_first,
        CONV_BITS=8 * conv.element_size(), RECURRENT_BITS=8 * recurrent.element_size(),
        COLUMNS=columns, BLOCK_COLUMNS=block_columns, BLOCK_L=block_l, BLOCK=block,
        num_warps=chosen["num_warps"],
    )  # fmt: skip
