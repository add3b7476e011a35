"""A plugin of vLLM: its Kimi KDA layer computes with this package's operators.

vLLM calls `register` at its start, in every process, as an entry point of the group
`vllm.general_plugins`. From then on its models build a subclass of `KimiGatedDeltaNetAttention`
that replaces what is between the layer's projections. Everything else stays vLLM's: weights and
their loaders, quantization, tensor parallelism, the states and their blocks, CUDA graphs.

What was read for it, in vLLM 0.33.0 (4ba787ec9), below `vllm/`:

* `model_executor/layers/mamba/gdn/kimi_gdn_linear_attn.py` and `base.py`: the layer
* `models/kimi_k3/nvidia/model.py`, `models/kimi_k3/amd/linear.py`: who builds and calls it
* `v1/attention/backends/gdn_attn.py`: the metadata of a step
* `model_executor/layers/mamba/mamba_utils.py`, `abstract.py`: states and their layouts
* `model_executor/custom_op.py`: `PluggableLayer`, the registry of out-of-tree layers
* `compilation/breakable_cudagraph.py`, `forward_context.py`, `plugins/__init__.py`
"""

import importlib
import inspect
import logging
from typing import Any

from torch import Tensor

from kda_ops._checks import MAX_HEAD_DIM
from kda_ops._versions import why_unknown
from kda_ops.cache.batch import KDABatch
from kda_ops.conv.short_conv_qkv import short_conv_qkv
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.kda_decode import kda_decode
from kda_ops.delta_rule.kda_decode.op import MOST_TOKENS
from kda_ops.integrations.vllm.functions import QK_NORM_EPS
from kda_ops.integrations.vllm.metadata import batch_of_metadata
from kda_ops.norm.rms_norm_gated import rms_norm_gated

log = logging.getLogger(__name__)

READ = "0.33"  # the version whose source was read
LAYER = "KimiGatedDeltaNetAttention"
FORWARD = ["self", "mixed_qkv", "g1", "g2", "beta", "core_attn_out"]


def register(*, any_version: bool = False) -> bool:
    """Lets vLLM build its Kimi KDA layers with this package's operators.

    The entry point of the plugin; `VLLM_PLUGINS` says which plugins vLLM loads. Does nothing but
    log a warning where the plugin does not fit: without vLLM, in a version of vLLM that was not
    read, with a layer of another interface, or if another plugin has replaced the layer. Twice is
    as good as once.

    A layer that the operators cannot take (heads wider than 256, more than 7 speculative tokens,
    ReplaySSM, a device that is neither a CPU nor CUDA) becomes vLLM's own again when it is built,
    with a warning.

    Args:
        any_version: Also in versions of vLLM that were not read, if the interface is the same.

    Returns:
        Whether vLLM builds this package's layers from now on.
    """
    reason = _register(any_version)
    if reason is not None:
        log.warning("kda_ops leaves vLLM's KDA layer as it is: %s", reason)
    return reason is None


def _register(any_version: bool) -> str | None:
    """Registers the layer, or says why not."""
    reason = why_unknown("vLLM", READ, any_version)
    if reason is not None:
        return reason
    try:
        registry = importlib.import_module("vllm.model_executor.custom_op")
        layers = importlib.import_module(
            "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn"
        )
        stock = getattr(layers, LAYER)
        taken = registry.op_registry_oot.get(LAYER)
        register_oot = registry.PluggableLayer.register_oot
        layer = None if taken is not None else _layer_class(stock)
    except Exception as error:  # whatever an import raises here would end vLLM
        return f"this vLLM has another interface: {error}"
    if taken is not None:
        return None if issubclass(taken, KDALayer) else f"{taken.__qualname__} has replaced it"
    signature = list(inspect.signature(stock._forward).parameters)
    if signature != FORWARD:
        return f"its _forward must have the parameters {FORWARD}, got {signature}"
    register_oot(layer, name=LAYER)
    return None


def _layer_class(stock: type) -> type:
    """The subclass of vLLM's layer, whose modules are imported here."""
    context = importlib.import_module("vllm.forward_context")
    graphs = importlib.import_module("vllm.compilation.breakable_cudagraph")
    states = importlib.import_module("vllm.model_executor.layers.mamba.mamba_utils")
    # vLLM's wrapper has to be the outermost: it runs the step between two CUDA graphs
    forward = graphs.eager_break_during_capture(KDALayer._forward)
    members = {
        "__module__": __name__,
        "__doc__": f"vLLM's `{LAYER}` on the operators of kda_ops.",
        "stock": stock,
        "forward_context": staticmethod(context.get_forward_context),
        "channels_first": staticmethod(states.is_conv_state_dim_first),
        "_forward": forward,
    }
    return type(f"KDAOps{LAYER}", (KDALayer, stock), members)


class KDALayer:
    """What is ours in the layer; `_layer_class` adds vLLM's."""

    stock: type
    forward_context: Any
    channels_first: Any

    prefix: str
    local_projection_size: int
    head_dim: int
    num_spec: int
    gate_lower_bound: float | None
    conv1d: Any
    A_log: Tensor
    dt_bias: Tensor
    o_norm: Any
    kv_cache: tuple[Tensor, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reason = _refusal(self)
        if reason is not None:
            log.warning("kda_ops leaves %s to vLLM: %s", self.prefix, reason)
            self.__class__ = self.stock

    def _forward(
        self, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor
    ) -> None:
        """A step of the layer on its states, which are written, as is `core_attn_out`.

        H heads of this rank, K = V channels each, T rows of which the metadata says how many are
        real. All others become zero, and so does everything if there is no metadata, as when vLLM
        measures the memory that it needs.

        Args:
            mixed_qkv: `[T, 3 * H * K]`, q | k | v before their convolution.
            g1: `[1, T, H, K]`, the gate's input.
            g2: `[T, H, V]`, the output gate before its sigmoid.
            beta: `[1, T, H]`, before its sigmoid.
            core_attn_out: `[1, T, H, V]`, the normalized and gated output.
        """
        metadata = self.forward_context().attn_metadata
        if metadata is not None:
            metadata = metadata.get(self.prefix)
        if metadata is None or metadata.num_actual_tokens == 0:
            core_attn_out.zero_()
            return
        batch, order = batch_of_metadata(metadata)
        rows, decode_rows = batch.num_tokens, batch.num_decode_tokens
        inputs = (mixed_qkv[:rows], g1[0, :rows], beta[0, :rows], g2[:rows])
        if order is not None:
            inputs = tuple(x.index_select(0, order) for x in inputs)
        out = core_attn_out[0, :rows]
        core_attn_out[0, rows:].zero_()
        steps = []
        if batch.kind != "prefill":
            steps.append((self._decode, slice(0, decode_rows)))
        if batch.kind != "decode":
            steps.append((self._prefill, slice(decode_rows, rows)))
        for step, part in steps:
            o = step(batch, *(x[part] for x in inputs))[0]
            if order is None:
                out[part].copy_(o)
            else:
                out.index_copy_(0, order[part], o)

    def _decode(
        self, batch: KDABatch, x: Tensor, raw_gate: Tensor, raw_beta: Tensor, output_gate: Tensor
    ) -> Tensor:
        conv, recurrent = self.kv_cache
        cu_seqlens, state_indices = batch.decodes()
        return kda_decode(
            x,
            conv,
            self.conv1d.weight,
            self.conv1d.bias,
            raw_gate=raw_gate,
            raw_beta=raw_beta,
            output_gate=output_gate,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            lower_bound=self.gate_lower_bound,
            norm_weight=self.o_norm.weight,
            norm_eps=self.o_norm.eps,
            qk_norm_eps=QK_NORM_EPS,
            state=recurrent,
            state_indices=state_indices,
            num_accepted=batch.num_accepted,
            cu_seqlens=cu_seqlens,
            layout=self._layout(),
        )

    def _prefill(
        self, batch: KDABatch, x: Tensor, raw_gate: Tensor, raw_beta: Tensor, output_gate: Tensor
    ) -> Tensor:
        conv, recurrent = self.kv_cache
        state_indices, continues = batch.prefills()
        if state_indices.dim() == 2:
            state_indices = state_indices[:, 0]
        cu_seqlens = batch.prefill_cu_seqlens
        q, k, v = short_conv_qkv(
            x[None],
            self.conv1d.weight,
            self.conv1d.bias,
            key_dim=self.local_projection_size,
            head_dim=self.head_dim,
            norm_eps=QK_NORM_EPS,
            conv_state=conv,
            state_indices=state_indices,
            has_initial_state=continues,
            cu_seqlens=cu_seqlens,
            layout=self._layout(),
            **batch.blocks(),
        )
        o, _ = chunk_kda_gated(
            q,
            k,
            v.unflatten(-1, (-1, self.head_dim)),
            raw_gate[None],
            raw_beta[None],
            self.A_log,
            self.dt_bias,
            lower_bound=self.gate_lower_bound,
            cu_seqlens=cu_seqlens,
            chunk_indices=batch.chunk_indices,
            state=recurrent,
            state_indices=state_indices,
            has_initial_state=continues,
            **batch.blocks(),
        )
        return rms_norm_gated(o, output_gate[None], self.o_norm.weight, eps=self.o_norm.eps)

    def _layout(self) -> str:
        return "DS" if self.channels_first() else "SD"


def _refusal(layer: Any) -> str | None:
    """Why the operators cannot take a layer; None if they can."""
    if layer.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {layer.head_dim}"
    if layer.num_spec >= MOST_TOKENS:
        return f"num_speculative_tokens must be at most {MOST_TOKENS - 1}, got {layer.num_spec}"
    if getattr(layer.cache_config, "use_kda_recoverssm", False):
        return "ReplaySSM keeps its states elsewhere"
    if layer.A_log.device.type not in ("cpu", "cuda", "meta"):
        return f"device must be cpu or cuda, got {layer.A_log.device.type}"
    return None
