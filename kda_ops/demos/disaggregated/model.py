"""A small Kimi stack with random weights, whole or one tensor-parallel shard, on paged caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec, Segment, units_held
from kda_ops.nn import parallelize
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.transfer.geometry import EngineGeometry, packed_geometry, state_geometry
from kda_ops.transfer.pages import buffer_pages

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPE = torch.float32


@dataclass(frozen=True)
class StackConfig:
    """Sizes of the stack and of its caches."""

    layers: str = "KKAK"  # K: KDA, A: softmax attention without positions
    hidden: int = 64
    heads: int = 4
    value_heads: int = 8
    head_dim: int = 16
    kv_heads: int = 2
    mlp: int = 128
    vocabulary: int = 256
    seed: int = 0
    layout: str = "DS"
    num_spec: int = 0
    block_tokens: int = 16
    pages: int = 256
    device: str = "cpu"


# What a KDA layer of Kimi Linear has, and as many of them; its attention is MLA, here it is not.
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "kimi-linear": {
        "layers": "KKKA" * 6 + "KKA", "hidden": 2304, "heads": 32, "value_heads": 32,
        "head_dim": 128, "kv_heads": 8, "mlp": 9216,
    },
}  # fmt: skip


def held(x: Tensor, units: int, tp_size: int, rank: int) -> Tensor:
    """The rows of a weight that belong to the heads of a rank."""
    heads = units_held(units, tp_size, rank)
    return x.unflatten(0, (units, -1))[heads.start : heads.stop].flatten(0, 1)


class Attention(nn.Module):
    """Grouped-query attention over paged keys and values."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor, pages: Tensor, blocks: list[int], start: int) -> Tensor:
        """`x [T, hidden]` at positions from `start`, `pages [pages, 2, heads, tokens, dim]`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in projections)
        size = pages.shape[3]
        positions = torch.arange(start, start + x.shape[0], device=x.device)
        table = torch.tensor(blocks, device=x.device)
        at = table[positions // size]
        pages[at, 0, :, positions % size] = k
        pages[at, 1, :, positions % size] = v
        used = table[: -(-(start + x.shape[0]) // size)]
        keys, values = (
            pages[used, i].permute(1, 0, 2, 3).flatten(1, 2)[:, : start + x.shape[0]]
            for i in range(2)
        )
        mask = torch.arange(keys.shape[1], device=x.device)[None] <= positions[:, None]
        groups = q.shape[1] // k.shape[1]
        o = F.scaled_dot_product_attention(
            q.transpose(0, 1),
            keys.repeat_interleave(groups, dim=0),
            values.repeat_interleave(groups, dim=0),
            attn_mask=mask,
        )
        return self.o_proj(o.transpose(0, 1).flatten(1))

    def shard(self, config: StackConfig, tp_size: int, rank: int) -> None:
        """Keeps the heads of one rank."""
        for projection, units in (
            (self.q_proj, config.heads),
            (self.k_proj, config.kv_heads),
            (self.v_proj, config.kv_heads),
        ):
            projection.weight = _parameter(held(projection.weight, units, tp_size, rank))
        kept = held(self.o_proj.weight.t(), config.heads, tp_size, rank)
        self.o_proj.weight = _parameter(kept.t())


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def shard(self, tp_size: int, rank: int) -> None:
        """Keeps the channels of one rank."""
        for linear in (self.gate, self.up):
            linear.weight = _parameter(linear.weight.chunk(tp_size)[rank])
        self.down.weight = _parameter(self.down.weight.chunk(tp_size, dim=1)[rank])


class Stack(nn.Module):
    """Embedding, blocks, logits; with a mesh the share of one of its ranks.

    KDA layers are parallel by `kda_ops.nn.parallelize`. Of the others `reduce` sums the partial
    results over the ranks.
    """

    def __init__(
        self,
        config: StackConfig,
        mesh: "DeviceMesh | None" = None,
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.reduce = config, reduce
        with torch.device(config.device):
            self._make(config)
        if mesh is not None:
            parallelize(self, mesh, src_data_rank=None)  # the seed is the same on all ranks
            for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
                if isinstance(mixer, Attention):
                    mixer.shard(config, mesh.size(), mesh.get_local_rank())
                mlp.shard(mesh.size(), mesh.get_local_rank())

    def _make(self, config: StackConfig) -> None:
        """The whole model, with weights that depend on the seed and the kind of device alone."""
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.mixers = nn.ModuleList(
            Attention(config)
            if kind == "A"
            else KimiDeltaAttention(
                config.hidden,
                config.head_dim,
                config.heads,
                num_v_heads=config.value_heads,
                conv_layout=config.layout,
            )
            for kind in config.layers
        )
        self.mlps = nn.ModuleList(Mlp(config) for _ in config.layers)
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden) for _ in range(2 * len(self.mlps) + 1))
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, caches: "Caches", batch: KDABatch, blocks: list[int], start: int
    ) -> Tensor:
        """Logits `[T, vocabulary]` of one sequence's tokens from position `start` on.

        Raises:
            ValueError: The caches have no room for the tokens; no layer has written anything.
        """
        self._check(tokens, batch, blocks, start)
        x = self.embedding(tokens)
        kda = attention = 0
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y = self.norms[2 * i](x)
            if isinstance(mixer, Attention):
                y = self.reduce(mixer(y, caches.kv[attention], blocks, start))
                attention += 1
            else:
                state = (caches.conv[kda], caches.recurrent[kda])
                y = mixer(y[None], state=state, batch=batch)[0]
                kda += 1
            x = x + y
            x = x + self.reduce(mlp(self.norms[2 * i + 1](x)))
        return self.head(self.norms[-1](x))

    def _check(self, tokens: Tensor, batch: KDABatch, blocks: list[int], start: int) -> None:
        """Checks everything that a later layer would reject."""
        config, count = self.config, len(tokens)
        batch.check_slots(config.pages)
        if batch.num_tokens != count:
            raise ValueError(f"batch must have {count} tokens, got {batch.num_tokens}")
        needed = -(-(start + count) // config.block_tokens)
        if len(blocks) < needed:
            raise ValueError(f"blocks must be at least {needed}, got {len(blocks)}")
        wrong = [block for block in blocks if not 0 <= block < config.pages]
        if wrong:
            raise ValueError(f"blocks must be in [0, {config.pages}), got {wrong[0]}")


class Caches:
    """The pages of one rank: states of the KDA layers, keys and values of the others."""

    def __init__(self, config: StackConfig, tp_size: int, page_padding: int = 0) -> None:
        sizes = (config.heads, config.value_heads, config.head_dim, config.head_dim)
        options: dict[str, Any] = {
            "num_spec": config.num_spec,
            "conv_dtype": DTYPE,
            "layout": config.layout,
            "tp_size": tp_size,
        }
        spec = KDAStateSpec(*sizes, **options)
        padded = state_geometry(spec, pages=1, block_tokens=1).page_bytes + page_padding
        spec = KDAStateSpec(*sizes, **options, page_bytes=padded)
        kda, attention = config.layers.count("K"), config.layers.count("A")
        unit = config.block_tokens * config.head_dim * DTYPE.itemsize
        kv = packed_geometry(
            [Segment(name, config.kv_heads, unit) for name in ("k", "v")],
            name="kv",
            kind="attention",
            dtypes={"k": "float32", "v": "float32"},
            tp_size=tp_size,
            pages=config.pages,
            block_tokens=config.block_tokens,
            layers=attention,
        )
        state = state_geometry(
            spec, pages=config.pages, layers=kda, block_tokens=config.block_tokens
        )
        self.geometry = EngineGeometry((state, kv))
        self.conv: Any
        self.conv, self.recurrent = spec.allocate(config.pages, layers=kda, device=config.device)
        heads = len(units_held(config.kv_heads, tp_size, 0))
        sizes_of_kv = (attention, config.pages, kv.page_bytes)
        whole = torch.zeros(sizes_of_kv, dtype=torch.uint8, device=config.device)
        shape = (2, heads, config.block_tokens, config.head_dim)
        self.kv = whole.view(DTYPE).unflatten(-1, shape)
        self.pages = [buffer_pages(self.conv, state.page_bytes), list(whole.unbind(0))]


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone().contiguous())
