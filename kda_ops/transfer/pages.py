"""The pages of an engine as bytes in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kda_ops.transfer.blocks import PageTail
from kda_ops.transfer.geometry import EngineGeometry, PageGeometry
from kda_ops.transfer.plan import plan_zero
from kda_ops.transfer.transport import MEMORIES, Region


def buffer_pages(state: Tensor, page_bytes: int) -> list[Tensor]:
    """The pages of a state as bytes, one `[slots, page_bytes]` per layer.

    Args:
        state: `conv` from `KDAStateSpec.allocate` with `layers`, the first view of its buffer;
            `recurrent` if there is no convolution.
        page_bytes: `page_bytes` of the spec.

    Raises:
        ValueError: The state is not at the start of its buffer, or the buffer is too short.
    """
    layers, slots = state.shape[:2]
    storage = state.untyped_storage()
    if state.storage_offset() != 0 or storage.nbytes() < layers * slots * page_bytes:
        raise ValueError(
            f"state must begin a buffer of at least {layers * slots * page_bytes} bytes, got "
            f"offset {state.storage_offset()} in {storage.nbytes()} bytes"
        )
    whole = torch.empty(0, dtype=torch.uint8, device=state.device)
    whole.set_(storage, 0, (layers, slots, page_bytes))
    return list(whole.unbind(0))


def page_regions(geometry: EngineGeometry, pages: Sequence[Sequence[Tensor]]) -> list[list[Region]]:
    """The regions of the pages of every group and layer.

    Args:
        geometry: Their required geometry.
        pages: Per group and layer, uint8 `[pages, page_bytes]` without gaps.

    Raises:
        ValueError: Pages that do not fit the geometry.
    """
    if len(pages) != len(geometry.groups):
        raise ValueError(f"pages must have {len(geometry.groups)} groups, got {len(pages)}")
    regions = []
    for group, layers in zip(geometry.groups, pages, strict=True):
        where = f"pages of group {group.name}"
        if len(layers) != group.layers:
            raise ValueError(f"{where} must have {group.layers} layers, got {len(layers)}")
        for x in layers:
            if x.dtype != torch.uint8 or tuple(x.shape) != (group.pages, group.page_bytes):
                raise ValueError(
                    f"{where} must be uint8 {[group.pages, group.page_bytes]}, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if not x.is_contiguous():
                raise ValueError(f"{where} must have no gaps, got strides {x.stride()}")
        regions.append([Region(x.data_ptr(), x.numel(), max(x.get_device(), 0)) for x in layers])
    return regions


def zero_tails(layers: Sequence[Tensor], geometry: PageGeometry, tails: Sequence[PageTail]) -> None:
    """Zeroes tokens that no remote page covers, in the pages of every layer of a group."""
    for tail in tails:
        for offset, nbytes in plan_zero(geometry, tail.first_token, tail.end_token):
            for pages in layers:
                pages[tail.page, offset : offset + nbytes] = 0


def page_memory(pages: Sequence[Sequence[Tensor]]) -> str:
    """The memory of all pages of an engine: `"cpu"` or `"cuda"`.

    Raises:
        ValueError: They are elsewhere, or in different kinds of memory.
    """
    found = sorted({x.device.type for layers in pages for x in layers})
    if len(found) != 1 or found[0] not in MEMORIES:
        raise ValueError(f"pages must all be on {' or all on '.join(MEMORIES)}, got {found}")
    return found[0]
