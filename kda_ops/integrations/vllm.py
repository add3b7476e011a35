"""For vLLM users: its names for KDA states, their transfer and its two fused functions.

Each is a thin wrapper of this package's own, so that an engine can migrate one call at a time.
Names and argument order are vLLM's where the meaning is the same; where it is not, the docstring
says how it differs. vLLM is never imported.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kda_ops._checks import check_at_least
from kda_ops._numerics import CHUNK, QK_NORM_EPS
from kda_ops.cache.spec import CONV_DTYPES, KDAStateSpec
from kda_ops.cache.state_copy import state_copy
from kda_ops.config import LAYOUTS, configured_layout
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.norm.l2norm import l2norm
from kda_ops.transfer.blocks import BlockGroup, match_blocks
from kda_ops.transfer.geometry import EngineGeometry, check_compatible
from kda_ops.transfer.plan import Granules, plan_granules, source_ranks

LAYOUT_VARIABLE = "VLLM_SSM_CONV_STATE_LAYOUT"
SAFE_GATE_BOUND = -5.0

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


# ---------------------------------------------------------------------- states


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


# ---------------------------------------------------------------------- transfer


@dataclass(frozen=True)
class MambaConvSplitInfo:
    """Where q, k and v lie in the conv state of one rank in layout DS.

    Attributes:
        conv_rows: L.
        local_proj_dims: Channels of q, k and v on the rank.
        conv_dtype_size: Bytes of an element.
        ssm_sizes: Bytes of the conv state and of the recurrent state.
        local_conv_offsets: `(offset, bytes)` of q, k and v in a page.
    """

    conv_rows: int
    local_proj_dims: tuple[int, int, int]
    conv_dtype_size: int
    ssm_sizes: tuple[int, int]
    local_conv_offsets: tuple[tuple[int, int], ...]


def derive_mamba_conv_split(spec: KDAStateSpec) -> MambaConvSplitInfo:
    """The split of a conv state, read off its spec.

    vLLM derives it from total sizes; a spec holds the segments, so there is nothing to derive and
    no case where heads or dimensions do not decompose. What another rank or engine holds is
    `plan_reads`' business.

    Raises:
        ValueError: The layout is not DS, in which alone each part is one range.
    """
    if spec.layout != "DS":
        raise ValueError(f"layout must be DS, got {spec.layout}")
    names = ("q", "k", "v")
    return MambaConvSplitInfo(
        conv_rows=spec.conv_length,
        local_proj_dims=spec.conv_sizes,
        conv_dtype_size=spec.conv_dtype.itemsize,
        ssm_sizes=(sum(map(spec.local_bytes, names)), spec.local_bytes("recurrent")),
        local_conv_offsets=tuple((spec.offset(n), spec.local_bytes(n)) for n in names),
    )


def compute_mamba_phys_ratio(ssm_sizes: Sequence[int], block_len: int) -> int:
    """Blocks of `block_len` bytes that one state covers.

    Only for who shares an allocator's blocks between states and attention. Transfers here do not
    use it: a state is always one page, and every engine says in its handshake how many pages a
    block of its own is (`pages_per_block`).

    Raises:
        ValueError: `block_len` below 1.
    """
    check_at_least("block_len", block_len, 1)
    return -(-sum(ssm_sizes) // block_len)


@dataclass(frozen=True)
class HeteroTPTransferConfig:
    """Who reads what of whom, for one decode rank and one prefill engine.

    Attributes:
        local: Geometry of the decode engine.
        remote: Geometry of the prefill engine.
        d_rank: Rank of the decode engine.

    Raises:
        GeometryError: The geometries do not fit together, or the rank does not exist.
    """

    local: EngineGeometry
    remote: EngineGeometry
    d_rank: int

    def __post_init__(self) -> None:
        check_compatible(self.local, self.remote)
        source_ranks(self.remote.tp_size, self.local.tp_size, self.d_rank)

    @property
    def transfer_targets(self) -> list[int]:
        """The prefill ranks that this rank talks to, and owes a notice."""
        return list(source_ranks(self.remote.tp_size, self.local.tp_size, self.d_rank))

    def reads(self, group: int, p_rank: int) -> Granules:
        """Reads of one group from one prefill rank: a whole page each, or a granule of one."""
        plan = plan_granules(self.remote.groups[group], self.local.groups[group], self.d_rank)
        return plan.of_rank(p_rank)

    def read_targets(self, group: int) -> list[int]:
        """The prefill ranks that provide anything of a group, in the order of their units."""
        return [p for p in self.transfer_targets if self.reads(group, p).reads]

    def should_skip(self, group: int, p_rank: int) -> bool:
        """Whether a prefill rank only repeats what another one provides of a group."""
        return p_rank not in self.read_targets(group)


def apply_prefix_caching(
    local_block_ids: Sequence[Sequence[int]],
    remote_block_ids: Sequence[Sequence[int]],
    kinds: Sequence[str],
    *,
    num_spec: int = 0,
    local_running: int | Sequence[int | None] | None = None,
    remote_running: int | Sequence[int | None] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Block ids to copy, pairwise, after what a local prefix hit already holds.

    For blocks of equal size on both engines, as vLLM's `_apply_prefix_caching`; any group may be
    empty without an effect on the others. Blocks of other sizes, and what is to be zeroed, are
    `kda_ops.transfer.blocks.match_blocks`.

    Args:
        local_block_ids: Per group, blocks to fill: without those of the hit.
        remote_block_ids: Per group, blocks of the whole request on the other engine.
        kinds: Per group `"state"` or `"attention"`.
        num_spec: Speculative tokens per step. Lists of states then have blocks for them behind the
            running one, which the next two name.
        local_running: See `match_blocks`.
        remote_running: Likewise.

    Returns:
        Local and remote lists, equally long in each group; of a state group at most one block.

    Raises:
        ValueError: As `match_blocks`.
    """
    groups = [BlockGroup(kind, 1, 1, num_spec=num_spec if kind == "state" else 0) for kind in kinds]
    matches = match_blocks(
        local_block_ids,
        remote_block_ids,
        groups,
        local_running=local_running,
        remote_running=remote_running,
    )
    return (
        [[copy.local_page for copy in match.copies] for match in matches],
        [[copy.remote_page for copy in match.copies] for match in matches],
    )


# ---------------------------------------------------------------------- fused functions


def fused_kda_gate_chunk_cumsum(
    raw_g: Tensor,
    A_log: Tensor,
    g_bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    chunk_size: int = CHUNK,
    safe_gate: bool | None = None,
    lower_bound: float | None = None,
) -> Tensor:
    """`kda_ops.gate_cumsum`: the cumulative gate of each chunk, in **log2**.

    Args:
        raw_g: `[B, T, HV, K]`.
        A_log: HV numbers in any shape, as checkpoints have them.
        g_bias: `[HV, K]` or `[HV * K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences.
        chunk_indices: vLLM's `chunk_indices`, but of `kda_ops.varlen.prepare_chunk_indices`, which
            has a static shape; made here if None.
        chunk_size: Tokens.
        safe_gate: Whether the gate is bounded; None means that it is if `lower_bound` is given.
        lower_bound: In nats; -5 for a safe gate without one. Ignored if `safe_gate` is False.

    Returns:
        G, `[B, T, HV, K]`, fp32.

    Raises:
        ValueError: As `gate_cumsum`.
    """
    return gate_cumsum(
        raw_g,
        A_log.reshape(-1),
        g_bias,
        lower_bound=_gate_bound(safe_gate, lower_bound),
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )


def chunk_kda_with_fused_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_g: Tensor,
    beta: Tensor | None = None,
    A_log: Tensor | None = None,
    g_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    raw_beta: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    safe_gate: bool | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Chunked KDA from the raw gate: `chunk_kda_gated`, or `gate_cumsum` and `chunk_kda`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        raw_g: `[B, T, HV, K]`, the gate's input.
        beta: `[B, T, HV]` after its sigmoid, or None with `raw_beta`.
        A_log: HV numbers in any shape.
        g_bias: `[HV, K]` or `[HV * K]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, V, K]`; zeros if None.
        output_final_state: Whether to return the last state.
        use_qk_l2norm_in_kernel: Whether q and k are still to be normalised.
        cu_seqlens: `[N + 1]`, offsets of sequences.
        raw_beta: `[B, T, HV]` before its sigmoid: then one operator does all of it.
        chunk_indices: As `fused_kda_gate_chunk_cumsum`.
        safe_gate: Likewise.
        lower_bound: Likewise.

    Returns:
        `o [B, T, HV, V]` and the final state `[N, HV, V, K]` or None.

    Raises:
        ValueError: None or both of `beta` and `raw_beta`, and as the operators.
    """
    if (beta is None) == (raw_beta is None):
        given = "none" if beta is None else "both"
        raise ValueError(f"one of beta and raw_beta must be given, got {given}")
    A_log = None if A_log is None else A_log.reshape(-1)
    bound = _gate_bound(safe_gate, lower_bound)
    if raw_beta is not None:
        return chunk_kda_gated(
            q,
            k,
            v,
            raw_g,
            raw_beta,
            A_log,
            g_bias,
            lower_bound=bound,
            qk_norm_eps=QK_NORM_EPS if use_qk_l2norm_in_kernel else None,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, eps=QK_NORM_EPS), l2norm(k, eps=QK_NORM_EPS)
    g_cumsum = gate_cumsum(
        raw_g, A_log, g_bias, lower_bound=bound, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    return chunk_kda(
        q,
        k,
        v,
        g_cumsum,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )


def _gate_bound(safe_gate: bool | None, lower_bound: float | None) -> float | None:
    if safe_gate is None:
        return lower_bound
    if not safe_gate:
        return None
    return SAFE_GATE_BOUND if lower_bound is None else lower_bound
