"""The interfaces of vLLM 0.33 that the plugin touches, as far as it touches them.

`install` puts modules of vLLM's names into `sys.modules`: the registry of pluggable layers, the
Kimi KDA layer with its parameters and their loaders, but without kernels, the forward context, the
layout of states and the wrapper of what runs between two CUDA graphs. `describe` makes the metadata
of a step, as vLLM's `GDNAttentionMetadataBuilder` does.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VERSION = "0.33.0"
NULL_BLOCK = 0
MODULES = (
    "model_executor.custom_op",
    "model_executor.layers.mamba.gdn.kimi_gdn_linear_attn",
    "model_executor.layers.mamba.mamba_utils",
    "forward_context",
    "compilation.breakable_cudagraph",
)

# ---------------------------------------------------------------------- modules

_context = SimpleNamespace(attn_metadata=None)
breaks: list[Any] = []  # one entry for each step that ran between two CUDA graphs


def eager_break_during_capture(function: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        breaks.append(args[0])
        return function(*args, **kwargs)

    return wrapper


@contextmanager
def forward_context(metadata: dict[str, Any] | None) -> Iterator[None]:
    _context.attn_metadata = metadata
    try:
        yield
    finally:
        _context.attn_metadata = None


def install(
    monkeypatch: pytest.MonkeyPatch, layout: str = "SD", version: str = VERSION
) -> SimpleNamespace:
    """Fresh modules for a test; returns the attributes of all of them."""
    registry: dict[str, type] = {}

    class PluggableLayer(nn.Module):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(registry.get(cls.__name__, cls))

        @classmethod
        def register_oot(cls, layer: type, name: str) -> type:
            assert name not in registry
            registry[name] = layer
            return layer

    class KimiGatedDeltaNetAttention(StockLayer, PluggableLayer):
        pass

    names = {
        "op_registry_oot": registry,
        "PluggableLayer": PluggableLayer,
        "KimiGatedDeltaNetAttention": KimiGatedDeltaNetAttention,
        "is_conv_state_dim_first": lambda: layout == "DS",
        "get_forward_context": lambda: _context,
        "eager_break_during_capture": eager_break_during_capture,
    }
    for path in MODULES:
        module = ModuleType(f"vllm.{path}")
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parts = ["vllm", *path.split(".")[:-1]]
        for i in range(len(parts)):
            package = ".".join(parts[: i + 1])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setattr("kda_ops._versions.version", lambda name: version)
    breaks.clear()
    return SimpleNamespace(**names)


# ---------------------------------------------------------------------- the layer


class Linear(nn.Module):
    """One rank's linear layer: its weight has vLLM's loader, its result a bias of None."""

    def __init__(self, inputs: int, outputs: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = None
        self.weight = nn.Parameter(torch.zeros(sum(outputs), inputs, dtype=dtype))
        starts = [sum(outputs[:i]) for i in range(len(outputs))]

        def load(weight: Tensor, loaded: Tensor, shard: int | None = None) -> None:
            start = 0 if shard is None else starts[shard]
            weight.data[start : start + len(loaded)] = loaded

        self.weight.weight_loader = load

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class StockLayer(nn.Module):
    """vLLM's layer, with everything but its kernels."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        dtype, H, K = vllm_config.dtype, config.num_heads, config.head_dim
        exact = torch.promote_types(dtype, torch.float32)
        hidden, P = config.hidden_size, H * K
        self.prefix, self.cache_config = prefix, vllm_config.cache_config
        self.head_dim, self.local_num_heads, self.conv_size = K, H, config.conv_size
        self.local_projection_size, self.num_spec = P, vllm_config.num_spec
        self.gate_lower_bound = config.gate_lower_bound
        self.in_proj_qkvgfab = Linear(hidden, [P, P, P, H, K], dtype)
        self.f_b_proj = Linear(K, [P], dtype)
        self.dt_bias = nn.Parameter(torch.zeros(P, dtype=exact))
        self.conv1d = Linear(self.conv_size, [P, P, P], exact)
        self.conv1d.weight.data = self.conv1d.weight.data.unsqueeze(1)
        self.A_log = nn.Parameter(torch.zeros(H, dtype=exact))
        self.g_a_proj, self.g_b_proj = Linear(hidden, [K], dtype), Linear(K, [P], dtype)
        self.o_norm = nn.Module()
        self.o_norm.weight = nn.Parameter(torch.ones(K, dtype=dtype))
        self.o_norm.eps = 1e-5
        self.o_proj = Linear(P, [hidden], dtype)
        self.kv_cache: Any = None

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        H, K, P = self.local_num_heads, self.head_dim, self.local_projection_size
        projected = self.in_proj_qkvgfab(hidden_states)[0]
        mixed_qkv, beta, f_a = projected.split([3 * P, H, K], dim=-1)
        output_gate = self.g_b_proj(self.g_a_proj(hidden_states)[0])[0].unflatten(-1, (H, K))
        raw_gate = self.f_b_proj(f_a)[0].unflatten(-1, (H, K))[None]
        out = torch.empty(1, len(hidden_states), H, K, dtype=hidden_states.dtype)
        self._forward(
            mixed_qkv=mixed_qkv, g1=raw_gate, g2=output_gate, beta=beta[None], core_attn_out=out
        )
        return self.o_proj(out[0].flatten(-2))[0]

    def _forward(
        self, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor
    ) -> None:
        raise NotImplementedError("vLLM's kernels")


STACKED = {
    "q_proj.weight": ("in_proj_qkvgfab.weight", 0),
    "k_proj.weight": ("in_proj_qkvgfab.weight", 1),
    "v_proj.weight": ("in_proj_qkvgfab.weight", 2),
    "b_proj.weight": ("in_proj_qkvgfab.weight", 3),
    "f_a_proj.weight": ("in_proj_qkvgfab.weight", 4),
    "q_conv1d.weight": ("conv1d.weight", 0),
    "k_conv1d.weight": ("conv1d.weight", 1),
    "v_conv1d.weight": ("conv1d.weight", 2),
}


def load_weights(layer: nn.Module, checkpoint: Mapping[str, Tensor]) -> set[str]:
    """Loads Moonshot's names as vLLM's model does; returns the parameters that were loaded."""
    parameters, loaded = dict(layer.named_parameters()), set()
    for name, x in checkpoint.items():
        target, *shard = STACKED.get(name, (name,))
        parameter = parameters[target]
        if hasattr(parameter, "weight_loader"):
            parameter.weight_loader(parameter, x, *shard)
        else:
            parameter.data.copy_(x.reshape(parameter.shape))
        loaded.add(target)
    return loaded


def allocate(layer: Any, blocks: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States as vLLM binds them: views of blocks that hold both, one after the other, and more."""
    H, K, D = layer.local_num_heads, layer.head_dim, 3 * layer.local_projection_size
    L = layer.conv_size - 1 + layer.num_spec
    exact = torch.promote_types(dtype, torch.float32)
    sizes = [L * D * dtype.itemsize, H * K * K * exact.itemsize]
    pages = torch.zeros(blocks, sum(sizes) + 64, dtype=torch.uint8)
    conv, recurrent, rest = pages.split([*sizes, 64], dim=1)
    conv, recurrent = conv.view(dtype), recurrent.view(exact)
    conv.fill_(float("nan"))  # blocks are recycled without being cleared
    recurrent.fill_(float("nan"))
    rest.fill_(255)
    shape = (D, L) if layout == "DS" else (L, D)
    layer.kv_cache = (conv.unflatten(1, shape), recurrent.unflatten(1, (H, K, K)))
    return layer.kv_cache


# ---------------------------------------------------------------------- metadata


@dataclass
class Metadata:
    """The fields of `GDNAttentionMetadata` that a KDA layer of vLLM reads."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_spec_decodes: int
    num_spec_decode_tokens: int
    num_actual_tokens: int
    has_initial_state: Tensor | None = None
    spec_query_start_loc: Tensor | None = None
    non_spec_query_start_loc: Tensor | None = None
    spec_state_indices_tensor: Tensor | None = None
    non_spec_state_indices_tensor: Tensor | None = None
    spec_sequence_masks: Tensor | None = None
    spec_token_indx: Tensor | None = None
    non_spec_token_indx: Tensor | None = None
    num_accepted_tokens: Tensor | None = None


@dataclass
class Request:
    """A request's share of a step.

    Attributes:
        blocks: `1 + num_spec` blocks for its states.
        computed: Tokens before this step.
        tokens: Tokens of this step.
        accepted: Of its last step; above 0 if it is speculative.
    """

    blocks: Sequence[int]
    computed: int
    tokens: int
    accepted: int = 0


def describe(
    requests: Sequence[Request], padded_requests: int = 0, padded_tokens: int = 0
) -> Metadata:
    """The metadata of a step; decodes come first. Padding is that of a full CUDA graph."""
    table = torch.tensor([r.blocks for r in requests], dtype=torch.int32)
    lengths = torch.tensor([r.tokens for r in requests], dtype=torch.int32)
    computed = torch.tensor([r.computed for r in requests])
    accepted = torch.tensor([r.accepted for r in requests], dtype=torch.int32)
    table = torch.cat([table, table.new_full((padded_requests, table.shape[1]), NULL_BLOCK)])
    lengths, computed, accepted = (
        torch.cat([x, x.new_zeros(padded_requests)]) for x in (lengths, computed, accepted)
    )
    speculative = accepted > 0
    rows = int(lengths.sum())
    fields: dict[str, Any] = {"num_actual_tokens": rows + padded_tokens}
    if not speculative.any():
        # a request without tokens is padding, which counts as a decode unless it follows a prefill
        decode = (lengths == 0) | (lengths == 1) & (computed > 0)
        decodes = next((i for i, x in enumerate(decode.tolist()) if not x), len(decode))
        prefills = int((lengths[decodes:] > 0).sum())
        decode_rows = decodes if prefills else rows + padded_tokens
        return Metadata(
            num_prefills=prefills,
            num_prefill_tokens=rows + padded_tokens - decode_rows,
            num_decodes=decodes,
            num_decode_tokens=decode_rows,
            num_spec_decodes=0,
            num_spec_decode_tokens=0,
            has_initial_state=computed > 0 if prefills else None,
            non_spec_query_start_loc=offsets(lengths),
            non_spec_state_indices_tensor=table[:, 0],
            **fields,
        )
    speculative_rows = int(lengths[speculative].sum())
    fields |= {
        "num_decodes": 0,
        "num_decode_tokens": 0,
        "num_spec_decodes": int(speculative.sum()),
        "num_spec_decode_tokens": speculative_rows,
        "num_prefill_tokens": rows - speculative_rows,
        "spec_sequence_masks": speculative,
    }
    if speculative_rows == rows:
        return Metadata(
            num_prefills=0,
            spec_query_start_loc=offsets(lengths),
            spec_state_indices_tensor=table,
            spec_token_indx=torch.arange(rows, dtype=torch.int32),
            non_spec_token_indx=torch.empty(0, dtype=torch.int32),
            num_accepted_tokens=accepted.clamp(min=1),
            **fields,
        )
    of_token = speculative.repeat_interleave(lengths)
    order = of_token.to(torch.int8).argsort(stable=True)
    others = rows - speculative_rows
    return Metadata(
        num_prefills=int((lengths[~speculative] > 0).sum()),
        has_initial_state=(computed > 0)[~speculative],
        spec_query_start_loc=offsets(lengths[speculative]),
        non_spec_query_start_loc=offsets(lengths[~speculative]),
        spec_state_indices_tensor=table[speculative],
        non_spec_state_indices_tensor=table[~speculative, 0],
        spec_token_indx=order[others:],
        non_spec_token_indx=order[:others],
        num_accepted_tokens=accepted[speculative],
        **fields,
    )


def offsets(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
