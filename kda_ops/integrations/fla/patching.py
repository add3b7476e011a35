"""Puts the functions of this package in the place of flash-linear-attention's, and back."""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from kda_ops.integrations.fla.convolutions import (
    causal_conv1d,
    causal_conv1d_update,
    repad_hidden_states,
    short_convolution_forward,
    short_convolution_step,
    unpad_hidden_states,
)
from kda_ops.integrations.fla.pointwise import (
    fused_kda_gate,
    fused_rms_norm_gated_forward,
    kda_gate_chunk_cumsum,
    l2norm,
)
from kda_ops.integrations.fla.recurrence import (
    chunk_kda,
    fused_recurrent_kda,
    fused_recurrent_kda_fwd,
)
from kda_ops.integrations.fla.refusals import OFFERED, check_offered


def patch() -> None:
    """Puts the functions of this package in the place of FLA's, for all its layers and models.

    Every name of a loaded module of `fla` that stands for one of the functions is replaced, and the
    methods `ShortConvolution.forward`, `ShortConvolution.step` and `FusedRMSNormGated.forward`.
    Layers that exist are patched too. A module of yours that has imported a function from `fla`
    keeps FLA's: call `patch` before it is imported. In FLA's KDA layer padding is packed in
    tensors of a fixed size, so that a mask breaks no graph.

    Twice is as good as once.

    Raises:
        ImportError: flash-linear-attention is not installed.
        AttributeError: Its version does not have a function.
    """
    if not _replaced:
        _replaced.extend(_pairs())
    _exchange(_replaced)
    for cls, name, _, ours in _methods():
        setattr(cls, name, ours)


def unpatch() -> None:
    """Undoes `patch`. Without it nothing happens."""
    if not _replaced:
        return
    _exchange([(ours, theirs) for theirs, ours in _replaced])
    for cls, name, theirs, _ in _methods():
        setattr(cls, name, theirs)
    _replaced.clear()
    _methods_of_fla.clear()


def register_backend() -> None:
    """Offers the operators to FLA's own registry, as its backend `kda_ops`, before all others.

    FLA asks it in each call and takes another backend, or its own kernels, for what is refused
    here. The registry is never part of a compiled graph, so every call breaks the graph: `patch` is
    for `torch.compile`. Functions: `chunk_kda`, `fused_recurrent_kda_fwd`, `fused_kda_gate`,
    `kda_gate_chunk_cumsum` and `causal_conv1d_update`. The environment variable `FLA_KDA_OPS=0`
    disables it.

    Raises:
        ImportError: flash-linear-attention is not installed.
    """
    backends: Any = importlib.import_module("fla.backends")
    chunk: Any = importlib.import_module("fla.ops.kda.chunk")
    conv: Any = importlib.import_module("fla.modules.causal_conv1d.ops")
    by_place: dict[Any, list[Callable[..., Any]]] = {
        "kda": [fused_recurrent_kda_fwd, fused_kda_gate, kda_gate_chunk_cumsum],
        _original(chunk.chunk_kda): [chunk_kda],
        _original(conv.causal_conv1d_update): [causal_conv1d_update],
    }
    for place, functions in by_place.items():
        members: dict[str, Any] = {
            "backend_type": "kda_ops",
            "env_var": "FLA_KDA_OPS",
            "priority": -1,
        }
        for function in functions:
            members[function.__name__] = staticmethod(function)
            members[f"{function.__name__}_verifier"] = staticmethod(_verifier(function))
        backends.register(place)(type("KDAOpsBackend", (backends.BaseBackend,), members))


_replaced: list[tuple[Any, Any]] = []  # FLA's function and ours, while they are patched
_methods_of_fla: list[tuple[Any, str, Any, Any]] = []


def _pairs() -> list[tuple[Any, Any]]:
    """FLA's functions and ours."""
    places: dict[str, list[Callable[..., Any]]] = {
        "fla.ops.kda.chunk": [chunk_kda],
        "fla.ops.kda.fused_recurrent": [fused_recurrent_kda, fused_recurrent_kda_fwd],
        "fla.ops.kda.gate": [fused_kda_gate, kda_gate_chunk_cumsum],
        "fla.modules.norm.l2norm": [l2norm],
        "fla.modules.causal_conv1d.ops": [causal_conv1d, causal_conv1d_update],
    }
    return [
        (getattr(importlib.import_module(place), function.__name__), function)
        for place, functions in places.items()
        for function in functions
    ]


def _methods() -> list[tuple[Any, str, Any, Any]]:
    """Owner, name, FLA's and ours, of what is replaced in one place only."""
    if not _methods_of_fla:
        conv: Any = importlib.import_module("fla.modules.causal_conv1d.ops")
        norm: Any = importlib.import_module("fla.modules.norm.fused_norm_gate")
        layer: Any = importlib.import_module("fla.layers.kda")
        for owner, name, ours in (
            (conv.ShortConvolution, "forward", short_convolution_forward),
            (conv.ShortConvolution, "step", short_convolution_step),
            (norm.FusedRMSNormGated, "forward", fused_rms_norm_gated_forward),
            (layer, "unpad_hidden_states", unpad_hidden_states),
            (layer, "repad_hidden_states", repad_hidden_states),
        ):
            _methods_of_fla.append((owner, name, getattr(owner, name), ours))
    return _methods_of_fla


def _exchange(pairs: list[tuple[Any, Any]]) -> None:
    """Replaces the first of each pair by the second in every loaded module of FLA."""
    by_id = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fla" and module is not None:
            for attribute, value in list(vars(module).items()):
                if id(value) in by_id:
                    setattr(module, attribute, by_id[id(value)])


def _original(function: Any) -> Any:
    """FLA's function, of which FLA knows the registry, also while it is patched."""
    return next((theirs for theirs, ours in _replaced if ours is function), function)


def _verifier(function: Callable[..., Any]) -> Callable[..., tuple[bool, str | None]]:
    """Tells FLA whether a call is offered; FLA logs the message of an exception as the reason."""
    signature = inspect.signature(function)

    def verify(*args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        check_offered(**{name: x for name, x in given.items() if name in OFFERED})
        return True, None

    return verify
