"""vLLM's names for KDA states: layout, shapes, dtypes, copies between blocks."""

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kda_ops._checks import check_at_least
from kda_ops.cache.spec import CONV_DTYPES, KDAStateSpec
from kda_ops.cache.state_copy import state_copy
from kda_ops.config import LAYOUTS, configured_layout

LAYOUT_VARIABLE = "VLLM_SSM_CONV_STATE_LAYOUT"

CopyStates = Callable[
    [Tensor, Tensor, Sequence[Sequence[int]], Sequence[int], Sequence[int], Sequence[int]], None
]


def conv_state_layout(environment: Mapping[str, str] = os.environ) -> str:
    """`"SD"` or `"DS"` as `VLLM_SSM_CONV_STATE_LAYOUT` says; `"SD"` without it.

    For `kda_ops.config.conv_layout = conv_state_layout()`: this package's own variable is
    `KDA_OPS_CONV_LAYOUT`.

    Raises:
        ValueError: The variable holds anything else.
    """
    layout = environment.get(LAYOUT_VARIABLE, "SD")
    if layout not in LAYOUTS:
        raise ValueError(f"{LAYOUT_VARIABLE} must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def kda_state_spec(
    tp_world_size: int,
    num_heads: int,
    head_dim: int,
    num_k_heads: int | None = None,
    head_k_dim: int | None = None,
    conv_kernel_size: int = 4,
    num_spec: int = 0,
    *,
    model_dtype: torch.dtype = torch.bfloat16,
    mamba_cache_dtype: str = "auto",
    layout: str | None = None,
) -> KDAStateSpec:
    """The spec of what vLLM describes by a state shape and a state dtype.

    Args:
        tp_world_size: Tensor-parallel ranks.
        num_heads: HV, value heads of the whole layer.
        head_dim: V.
        num_k_heads: H, query and key heads; None means HV.
        head_k_dim: K; None means V.
        conv_kernel_size: W.
        num_spec: Speculative tokens per step.
        model_dtype: Of the model.
        mamba_cache_dtype: Of the conv state: `"auto"` for the model's, or a name.
        layout: None means `kda_ops.config.conv_layout`; see `conv_state_layout`.

    Raises:
        ValueError: As `KDAStateSpec`, or an unknown dtype.
    """
    conv_dtype, recurrent_dtype = kda_state_dtype(model_dtype, mamba_cache_dtype)
    return KDAStateSpec(
        num_heads if num_k_heads is None else num_k_heads,
        num_heads,
        head_dim if head_k_dim is None else head_k_dim,
        head_dim,
        conv_size=conv_kernel_size,
        num_spec=num_spec,
        conv_dtype=conv_dtype,
        recurrent_dtype=recurrent_dtype,
        layout=configured_layout(layout),
        tp_size=tp_world_size,
    )


def kda_state_shape(
    tp_world_size: int,
    num_heads: int,
    head_dim: int,
    num_k_heads: int | None = None,
    head_k_dim: int | None = None,
    conv_kernel_size: int = 4,
    num_spec: int = 0,
    *,
    layout: str | None = None,
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of both states of one slot on one rank: the spec's `conv_shape`, `recurrent_shape`.

    Differs from vLLM: the conv state has a row more per speculative token, the recurrent state is
    `(HV, V, K)` also where K and V differ, and fewer heads than ranks are replicated instead of
    divided. Arguments as `kda_state_spec`.

    Returns:
        `(L, D)` in layout SD or `(D, L)` in DS, and `(HV, V, K)`.
    """
    spec = kda_state_spec(
        tp_world_size,
        num_heads,
        head_dim,
        num_k_heads,
        head_k_dim,
        conv_kernel_size,
        num_spec,
        layout=layout,
    )
    return spec.conv_shape, spec.recurrent_shape


def kda_state_dtype(
    model_dtype: torch.dtype, mamba_cache_dtype: str = "auto"
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the conv and the recurrent state; the recurrent one is fp32, as in vLLM.

    Args:
        model_dtype: Of the model: bf16, fp16 or fp32.
        mamba_cache_dtype: `"auto"` for that, or `"bfloat16"`, `"float16"`, `"float32"`.

    Raises:
        ValueError: Another dtype.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in CONV_DTYPES}
    if model_dtype not in CONV_DTYPES:
        raise ValueError(f"model_dtype must be one of {', '.join(names)}, got {model_dtype}")
    if mamba_cache_dtype not in ("auto", *names):
        raise ValueError(
            f"mamba_cache_dtype must be auto or one of {', '.join(names)}, "
            f"got {mamba_cache_dtype!r}"
        )
    return names.get(mamba_cache_dtype, model_dtype), torch.float32


def kda_state_copy_func(layout: str | None = None, *, num_spec: int | None = None) -> CopyStates:
    """What copies the states of requests between blocks.

    vLLM returns a function per state that names one address and one number of elements, which
    cannot say a shifted conv state in layout DS. This returns one function that copies both states
    of all requests (and all layers) in one launch: `kda_ops.state_copy`.

    Args:
        layout: None means `kda_ops.config.conv_layout`.
        num_spec: As `state_copy`.

    Returns:
        `copy(conv, recurrent, block_ids, cur_block_idx, dst_block_idx, num_accepted_tokens)`: the
        two states of `KDAStateSpec.allocate`, then one entry per request: its list of blocks, the
        positions in it to copy from and to, and how many tokens were accepted. With `b` that number
        less one, conv rows from `b` on come from block `cur`, the recurrent state from block
        `cur + b`. Raises ValueError for positions that the list does not have and counts below 1.
    """
    resolved = configured_layout(layout)

    def copy(
        conv: Tensor,
        recurrent: Tensor,
        block_ids: Sequence[Sequence[int]],
        cur_block_idx: Sequence[int],
        dst_block_idx: Sequence[int],
        num_accepted_tokens: Sequence[int],
    ) -> None:
        rows = []
        for blocks, cur, dst, accepted in zip(
            block_ids, cur_block_idx, dst_block_idx, num_accepted_tokens, strict=True
        ):
            check_at_least("num_accepted_tokens", accepted, 1)
            bias = accepted - 1
            for position in (cur, cur + bias, dst):
                if not 0 <= position < len(blocks):
                    raise ValueError(
                        f"block_ids must hold position {position}, got {len(blocks)} blocks"
                    )
            rows.append((blocks[cur], blocks[cur + bias], blocks[dst], bias))
        plan = torch.tensor(rows, dtype=torch.int32, device=recurrent.device).reshape(-1, 4)
        state_copy(conv, recurrent, plan, layout=resolved, num_spec=num_spec)

    return copy
