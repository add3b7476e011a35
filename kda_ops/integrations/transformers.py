"""The KDA layers of a transformers model, computed by this package's operators.

    accelerate(model)  # in place and at once; `restore(model)` undoes it

A layer's class is replaced by a subclass of it, and nothing else changes: parameters and their
names, submodules, hooks, sharding plans, checkpoints, and transformers' own caches. So a prefill
and the decode that follows it may run either way. Only `register` imports transformers.

So is the class of the model around the layers, for compiled code alone: see `CausalModel`.

Models: Kimi Linear, GLM-5-Next and Ling 3 (`bailing_hybrid`).
"""

import functools
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kda_ops._checks import MAX_HEAD_DIM, check_lower_bound
from kda_ops._gradients import records_gradient
from kda_ops.conv.checks import resolve_activation
from kda_ops.conv.short_conv import short_conv
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.kda_decode import kda_decode
from kda_ops.integrations.packing import PACKED, PackedLinear, check_packable, pack, unpack
from kda_ops.norm.rms_norm_gated import rms_norm_gated

Model = TypeVar("Model", bound=nn.Module)

LAYERS = {  # by the name of the class, the module that has it
    "KimiLinearDeltaAttention": "transformers.models.kimi_linear.modeling_kimi_linear",
    "Glm5NextTextLinearAttention": "transformers.models.glm5_next.modeling_glm5_next",
    "BailingHybridDeltaAttention": "transformers.models.bailing_hybrid.modeling_bailing_hybrid",
}
MODELS = {  # those around them whose attention takes a causal mask
    "KimiLinearModel": "transformers.models.kimi_linear.modeling_kimi_linear",
    "BailingHybridModel": "transformers.models.bailing_hybrid.modeling_bailing_hybrid",
}
KNOWN = {**LAYERS, **MODELS}
CACHES = ("cache", "past_key_values")  # the argument's name, and its older one
QK_NORM_EPS = 1e-6
READ_DIRECTLY = ["conv1d", "forget_gate", "o_norm"]  # submodules whose parameters a layer reads


# ---------------------------------------------------------------------- models


def accelerate(model: Model, *, pack: bool = False) -> Model:
    """Lets this package compute the KDA layers of a model, in place.

    Eager and under `torch.compile`, with every cache and mask that transformers has. A module that
    is compiled already is compiled anew by its next call. Forward hooks on a layer's `forget_gate`,
    `o_norm` and `conv1d` are not called, as their parameters are read directly; all others are.

    Args:
        model: A model of transformers, or anything that contains its layers. Layers that are
            accelerated already stay as they are.
        pack: Make one GEMM of the six that a layer makes of its input. Their parameters become one,
            under the old names in `state_dict()` and `load_state_dict()`: to be called before an
            optimizer is made, and after whatever goes by the names of projections.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no KDA layer of transformers, or one that the operators do not
            take: a `lower_bound` outside `[-5, 0)`, an activation other than SiLU, heads wider than
            256, or a `forward` that something else has replaced. Or `pack` and projections that are
            not plain linear layers of one dtype and device. No layer is changed then.
    """
    _accelerate(model, pack)
    return model


def restore(model: Model) -> Model:
    """Gives the layers of a model their own class back; what `accelerate` and `register` undo.

    Args:
        model: Any module.

    Returns:
        The same model.
    """
    _restore(model.modules())
    return model


@contextmanager
def accelerated(model: Model, *, pack: bool = False) -> Iterator[Model]:
    """`accelerate` for the length of a `with` block, which gives back what it changed.

    Args:
        model: As `accelerate`.
        pack: As `accelerate`.

    Yields:
        The model.

    Raises:
        ValueError: As `accelerate`.
    """
    changed, newly_packed = _accelerate(model, pack)
    try:
        yield model
    finally:
        for layer in newly_packed:
            if hasattr(layer, PACKED):
                unpack(layer)
        _restore(changed)


def register() -> None:
    """Makes `from_pretrained` and `from_config` build models whose KDA layers are accelerated.

    Through `transformers.monkey_patching`; models that exist are not touched, nor are those that a
    class makes from a config. Twice is as good as once.

    Raises:
        ValueError: Something else is registered for one of the classes.
    """
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

    here = {name: _subclass(name) for name in KNOWN}
    there = get_patch_mapping()
    register_patch_mapping({name: cls for name, cls in here.items() if there.get(name) is not cls})


def unregister() -> None:
    """Undoes `register`; models that were built meanwhile stay accelerated until `restore`."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    there = get_patch_mapping()
    unregister_patch_mapping([name for name in KNOWN if there.get(name) is _subclass(name)])


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in list(modules):
        if isinstance(module, Accelerated):
            if hasattr(module, PACKED):
                unpack(module)
            _change_class(module, module.original)


def _accelerate(model: nn.Module, pack_too: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """Changes the layers of a model, and it; returns the modules that were not changed before, and
    those that were not packed.
    """
    chosen: list[nn.Module] = []
    packable: list[tuple[nn.Module, list[str]]] = []
    has_layers = False
    for name, module in model.named_modules():
        is_layer = LAYERS.get(type(module).__name__) == type(module).__module__
        has_layers = has_layers or is_layer or isinstance(module, KDALayer)
        if is_layer:
            _check(name, module)
        if pack_too and (is_layer or isinstance(module, KDALayer)) and not hasattr(module, PACKED):
            names = _projections(module)
            check_packable(name, module, names)
            packable.append((module, names))
        if KNOWN.get(type(module).__name__) == type(module).__module__:
            chosen.append(module)
    if not has_layers:
        raise ValueError(
            f"model must have layers of {', '.join(LAYERS)}, got {type(model).__name__} without any"
        )
    for module in chosen:
        original: Any = type(module)
        _change_class(module, accelerated_class(original))
    for module, names in packable:
        pack(module, names)
    return chosen, [module for module, _ in packable]


def _projections(layer: Any) -> list[str]:
    """The names of what is applied to a layer's input."""
    forget = "f_proj" if hasattr(layer.forget_gate, "f_proj") else "f_a_proj"
    output = "g_proj" if hasattr(layer, "g_proj") else "g_a_proj"
    return ["q_proj", "k_proj", "v_proj", "b_proj", f"forget_gate.{forget}", output]


def _check(name: str, layer: Any) -> None:
    """What the operators would refuse in the first call."""
    try:
        check_lower_bound(_lower_bound(layer.forget_gate))
        resolve_activation(layer.activation)
    except ValueError as error:
        raise ValueError(f"{name or 'model'} cannot be accelerated: {error}") from error
    if layer.head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name or 'model'} must have a head_dim of at most {MAX_HEAD_DIM}, "
            f"got {layer.head_dim}"
        )
    forward = vars(layer).get("_old_forward", vars(layer).get("forward"))
    if forward is not None and getattr(forward, "__func__", None) is not type(layer).forward:
        raise ValueError(
            f"{name or 'model'} must have the forward of its class, got one that was replaced"
        )


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Another class for a module that exists; every reference to it stays valid."""
    module.__class__ = cls
    for attribute in ("_old_forward", "forward"):  # accelerate keeps the method behind its hooks
        if isinstance(vars(module).get(attribute), MethodType):
            setattr(module, attribute, MethodType(cls.forward, module))


# ---------------------------------------------------------------------- classes


@functools.cache
def accelerated_class(original: type[nn.Module]) -> Any:
    """The subclass of one of transformers' classes that computes what it computes.

    It has the original's name, which wrapping policies go by, and is an attribute of this module,
    so that whole models can be pickled.
    """
    from transformers.integrations.accelerate import force_accelerate_hooks

    members = {
        "__module__": __name__,
        "__doc__": f"`{original.__name__}`, accelerated.",
        "original": original,
    }
    if original.__name__ in MODELS:
        members["forward"] = functools.wraps(original.forward)(CausalModel.forward)
        return type(original.__name__, (CausalModel, original), members)
    members["forward"] = force_accelerate_hooks(READ_DIRECTLY)(KDALayer.forward)
    return type(original.__name__, (KDALayer, original), members)


def _subclass(name: str) -> Any:
    return accelerated_class(getattr(importlib.import_module(KNOWN[name]), name))


def __getattr__(name: str) -> Any:
    if name in KNOWN:
        return _subclass(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


class Accelerated(nn.Module):
    """What all the subclasses share: the class that they are made of."""

    original: type[nn.Module]


class CausalModel(Accelerated):
    """What the accelerated classes of whole models share.

    Under `torch.compile` transformers makes the mask of a causal prompt: with torch 2.11 always,
    with 2.13 where there is no cache. With a mask attention computes all pairs of tokens, which
    took 2.7 of 16.7 ms at 8192 tokens on an H200. Where no token is padding, none is needed.
    """

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [kwargs.get(name) for name in ("attention_mask", "position_ids", *CACHES)]
        plain = len(args) <= 1 and all(x is None for x in given)
        if plain and torch.compiler.is_dynamo_compiling() and _uses_causal_flag(self.config):
            kwargs["attention_mask"] = dict.fromkeys(self.config.layer_types)
        return self.original.forward(self, *args, **kwargs)


def _uses_causal_flag(config: Any) -> bool:
    """Whether its attention, without a mask, is causal."""
    return config._attn_implementation == "sdpa" and getattr(config, "is_causal", True)


class KDALayer(Accelerated):
    """What the accelerated classes share: the forward.

    Its states are in transformers' cache, whose convolution state holds the last W tokens before
    the convolution, `[B, D, W]`, and whose recurrent state is `[B, H, K, V]` in fp32.
    """

    layer_idx: int
    head_dim: int
    qkv_dim: int
    conv_kernel_size: int
    activation: str
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    b_proj: nn.Module
    o_proj: nn.Module
    conv1d: nn.Conv1d
    forget_gate: Any
    o_norm: Any

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output, `[B, T, hidden]`; writes the states of the cache.

        Args:
            hidden_states: `[B, T, hidden]`.
            cache: transformers' cache, or None.
            attention_mask: `[B, T]`, 0 for padding, on either side.
            cache_params: The older name of `cache`.
            cu_seqlens: `[N + 1]`, offsets of sequences that are packed in one row.
            seq_idx: Only with `cu_seqlens`, which says the same.
            **kwargs: What transformers passes to all layers.

        Raises:
            ValueError: Packed sequences that continue from a cache, or come without `cu_seqlens`.
        """
        cache = cache_params if cache is None else cache
        if seq_idx is not None and cu_seqlens is None:
            raise ValueError("cu_seqlens must be given for packed sequences, got seq_idx alone")
        if attention_mask is not None:
            mask = attention_mask[:, :, None]
            hidden_states = (hidden_states * mask).to(hidden_states.dtype)
        old_conv = old_state = None
        if cache is not None:
            old_conv = cache.get_conv_state(self.layer_idx)
            old_state = cache.get_recurrent_state(self.layer_idx)
        if cu_seqlens is not None and old_conv is not None:
            raise ValueError("cu_seqlens must be None with a cache that has a state")

        x, beta, f, z = self._project(hidden_states)
        steps = old_state is not None and hidden_states.shape[1] == 1
        if steps and not records_gradient(hidden_states, *self.parameters()):
            o = self._decode(x, f, beta, z, old_conv, old_state)
        else:
            o = self._prefill(x, f, beta, cache, old_conv, old_state, cu_seqlens)
            o = rms_norm_gated(o, z, self.o_norm.weight, eps=self.o_norm.variance_epsilon)
        return self.o_proj(o.flatten(-2))

    def _prefill(
        self,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        cache: Any,
        old_conv: Tensor | None,
        old_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Whole sequences, or what follows the states of a cache, chunk by chunk."""
        rows = x
        if cache is not None:
            new_conv = cache.update_conv_state(
                x.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
            if old_conv is not None:  # the history goes before the tokens
                rows = new_conv.transpose(1, 2)
        y = short_conv(
            rows,
            self.conv1d.weight,
            self.conv1d.bias,
            activation=self.activation,
            cu_seqlens=cu_seqlens,
        )
        heads = self._heads(y[:, rows.shape[1] - x.shape[1] :])
        q, k, v = heads.split([self.qkv_dim // self.head_dim] * 3, dim=-2)
        A_log, dt_bias, lower_bound = self._gate()
        o, state = chunk_kda_gated(
            q,
            k,
            v,
            f,
            beta,
            A_log,
            dt_bias,
            lower_bound=lower_bound,
            qk_norm_eps=QK_NORM_EPS,
            initial_state=old_state,
            output_final_state=cache is not None,
            cu_seqlens=cu_seqlens,
            state_layout="KV",
        )
        if state is not None:
            cache.update_recurrent_state(state.float(), self.layer_idx)
        return o

    def _decode(
        self, x: Tensor, f: Tensor, beta: Tensor, z: Tensor, conv: Tensor, state: Tensor
    ) -> Tensor:
        """One token of every sequence, on the states of the cache in place, with the norm.

        Of the W columns of a convolution state the first is from before the history: nobody reads
        it, and it stays as it is.
        """
        past = self.conv1d.weight.shape[-1] - 1
        A_log, dt_bias, lower_bound = self._gate()
        o = kda_decode(
            x[:, 0],
            conv[..., conv.shape[-1] - past :],
            self.conv1d.weight,
            self.conv1d.bias,
            activation=self.activation,
            raw_gate=f,
            raw_beta=beta,
            output_gate=z,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            norm_weight=self.o_norm.weight,
            norm_eps=self.o_norm.variance_epsilon,
            qk_norm_eps=QK_NORM_EPS,
            state=state,
            layout="DS",
            state_layout="KV",
        )
        return o.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _gate(self) -> tuple[Tensor, Tensor, float | None]:
        """The parameters of the forget gate."""
        forget = self.forget_gate
        return forget.A_log.reshape(-1), forget.dt_bias, _lower_bound(forget)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v side by side, beta before its sigmoid, and the input of the forget gate before
        its bias and the output gate before its sigmoid, `[B, T, H, K]`, both of full or low rank.
        """
        layer: Any = self
        forget = self.forget_gate
        forget_low, output_low = hasattr(forget, "f_b_proj"), hasattr(layer, "g_b_proj")
        packed: PackedLinear | None = getattr(self, PACKED, None)
        if packed is None:
            qkv = (self.q_proj, self.k_proj, self.v_proj)
            x = torch.cat([project(hidden_states) for project in qkv], dim=-1)
            beta = self.b_proj(hidden_states)
            f = (forget.f_a_proj if forget_low else forget.f_proj)(hidden_states)
            z = (layer.g_a_proj if output_low else layer.g_proj)(hidden_states)
        else:
            sizes = [3 * self.qkv_dim, *packed.sizes[3:]]
            x, beta, f, z = packed(hidden_states).split(sizes, dim=-1)
        f = forget.f_b_proj(f) if forget_low else f
        z = layer.g_b_proj(z) if output_low else z
        return x, beta, self._heads(f), self._heads(z)


def _lower_bound(forget_gate: Any) -> float | None:
    """The bound of a forget gate in nats, None for one of softplus, under each model's names."""
    if hasattr(forget_gate, "safe_gate"):
        return forget_gate.lower_bound if forget_gate.safe_gate else None
    return getattr(forget_gate, "safe_gate_lower_bound", None)
