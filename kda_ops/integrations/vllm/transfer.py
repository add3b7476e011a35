"""vLLM's names for the transfer of states between engines."""

from collections.abc import Sequence
from dataclasses import dataclass

from kda_ops._checks import check_at_least
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.transfer.blocks import BlockGroup, match_blocks
from kda_ops.transfer.geometry import EngineGeometry, check_compatible
from kda_ops.transfer.plan import Granules, plan_granules, source_ranks


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
