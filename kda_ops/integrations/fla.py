"""flash-linear-attention's KDA, computed by this package's operators.

    patch()  # `unpatch()` undoes it

The functions here have the names, signatures and defaults of flash-linear-attention 0.6 (MIT,
https://github.com/fla-org/flash-linear-attention); `patch` puts them in their places. Its layers
then run on a CPU too, and compile without graph breaks. Only `patch`, `unpatch` and
`register_backend` import `fla`.

Shapes are FLA's: states `[N, HV, K, V]`, or `[N, HV, V, K]` with `state_v_first`, convolution
states `[N, D, W]`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import CHUNK, QK_NORM_EPS, RCP_LN2, accumulation_dtype
from kda_ops.conv.checks import resolve_activation
from kda_ops.conv.history import last_rows
from kda_ops.conv.short_conv import short_conv
from kda_ops.delta_rule.chunk_kda import chunk_kda as chunked
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.gating.chunk_cumsum import chunk_cumsum
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.norm.l2norm import l2norm as normalized
from kda_ops.norm.rms_norm_gated import rms_norm_gated

CONV_BACKENDS = ("triton", "cuda", "mix")


# ---------------------------------------------------------------------- patching


def patch() -> None:
    """Puts the functions of this module in the place of FLA's, for all its layers and models.

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
        _check_offered(**{name: x for name, x in given.items() if name in OFFERED})
        return True, None

    return verify


# ---------------------------------------------------------------------- what is refused

OFFERED = ("cp_context", "return_intermediate_states", "chunk_size")


def _check_offered(
    cp_context: Any = None, return_intermediate_states: bool = False, chunk_size: int = CHUNK
) -> None:
    if cp_context is not None:
        raise ValueError("cp_context must be None: sequences are not split over ranks here")
    if return_intermediate_states:
        raise ValueError(
            "return_intermediate_states must be False: states between chunks are not kept here"
        )
    if chunk_size != CHUNK:
        raise ValueError(f"chunk_size must be {CHUNK}, the only one of the kernels here, "
                         f"got {chunk_size}")  # fmt: skip


def _check_names(kwargs: dict[str, Any], *allowed: str) -> None:
    """Unlike FLA, which ignores them, refuses arguments that nothing reads."""
    unknown = sorted(kwargs.keys() - {*allowed})
    if unknown:
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}")


def _is_v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """The layout of a state, also by the argument's older name."""
    if state_v_first and "transpose_state_layout" in kwargs:
        raise ValueError("state_v_first and transpose_state_layout must not both be given")
    return kwargs.get("transpose_state_layout", state_v_first)


# ---------------------------------------------------------------------- the recurrence


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.chunk_kda`: whole sequences, with gradients of everything.

    Of its arguments `disable_recompute`, `cu_seqlens_cpu`, `use_graph` and `max_num_seqs` change
    nothing here: the backward always recomputes, nothing waits for the GPU, and the chunk table has
    a fixed size. `safe_gate` only asks for a `lower_bound`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`, in nats, or with `use_gate_in_kernel` the gate's input.
        beta: `[B, T, HV]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, K, V]`.
        output_final_state: Whether to return the states after the last token.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate of `A_log` and `dt_bias` here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        safe_gate: Whether the gate is bounded.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        disable_recompute: Ignored.
        return_intermediate_states: Refused.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        cu_seqlens_cpu: Ignored.
        cp_context: Refused.
        use_graph: Ignored.
        max_num_seqs: Ignored.
        **kwargs: `A_log [HV]`, `dt_bias [HV * K]`, `chunk_size`, which must be 64, and
            `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        `o [B, T, HV, V]` in the dtype of q, and the final state in fp32 or None.

    Raises:
        ValueError: `cp_context`, `return_intermediate_states`, another chunk size, a `lower_bound`
            outside `[-5, 0)`, or what the operators refuse.
        TypeError: An argument that is not known.
    """
    _check_names(kwargs, "A_log", "dt_bias", "chunk_size", "transpose_state_layout")
    _check_offered(cp_context, return_intermediate_states, kwargs.get("chunk_size", CHUNK))
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("lower_bound must be given with safe_gate and use_gate_in_kernel")
    _check_beta(allow_neg_eigval, use_beta_sigmoid_in_kernel)
    v_first = _is_v_first(state_v_first, kwargs)
    A_log, dt_bias = kwargs.get("A_log"), kwargs.get("dt_bias")
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": _to_v_first(initial_state, v_first),
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    beta_scale = 2.0 if allow_neg_eigval else 1.0
    # a graph for inference is rewritten to it from small operators, and the convolutions with them
    whole = torch.is_grad_enabled() or not torch.compiler.is_compiling()
    if whole and use_gate_in_kernel and use_beta_sigmoid_in_kernel:
        eps = QK_NORM_EPS if use_qk_l2norm_in_kernel else None
        o, final = chunk_kda_gated(
            q, k, v, g, beta, A_log, dt_bias, lower_bound=lower_bound, beta_scale=beta_scale,
            qk_norm_eps=eps, **options,
        )  # fmt: skip
        return o.type_as(q), _from_v_first(final, v_first)
    if use_qk_l2norm_in_kernel:
        q, k = normalized(q), normalized(k)
    if use_beta_sigmoid_in_kernel:
        beta = _sigmoid(beta, beta_scale)
    if use_gate_in_kernel:
        g = gate_cumsum(g, A_log, dt_bias, lower_bound=lower_bound, cu_seqlens=cu_seqlens)
    else:
        g = chunk_cumsum(g, scale=RCP_LN2, cu_seqlens=cu_seqlens)
    o, final = chunked(q, k, v, g, beta, **options)
    return o.type_as(q), _from_v_first(final, v_first)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.fused_recurrent_kda`: token by token, for short sequences.

    FLA's has no gradient. Where one is asked for, the chunks of `chunk_kda` compute the same here.

    Args:
        q: `[B, T, H, K]`; the others as in `chunk_kda`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`.
        beta: `[B, T, HV]`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        scale: `K ** -0.5` if None.
        initial_state: `[N, HV, K, V]`.
        output_final_state: Whether to return the states after the last token.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        **kwargs: `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        `o [B, T, HV, V]` in the dtype of v, and the final state in fp32 or None.

    Raises:
        ValueError: What the operators refuse.
        TypeError: An argument that is not known.
    """
    _check_names(kwargs, "transpose_state_layout")
    _check_beta(allow_neg_eigval, use_beta_sigmoid_in_kernel)
    options: dict[str, Any] = {
        "A_log": A_log,
        "dt_bias": dt_bias,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
        "state_v_first": _is_v_first(state_v_first, kwargs),
        "cu_seqlens": cu_seqlens,
    }
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return chunk_kda(q, k, v, g, beta, **options)
    return fused_recurrent_kda_fwd(q, k, v, g, beta, inplace_final_state=False, **options)


def fused_recurrent_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd`, without gradients.

    Args:
        q: `[B, T, H, K]`; the others as in `fused_recurrent_kda`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`.
        beta: `[B, T, HV]`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        initial_state: `[N, HV, K, V]`, or with `ssm_state_indices` pages of that shape.
        scale: `K ** -0.5` if None.
        output_final_state: Whether to return the states after the last token.
        inplace_final_state: Whether they are written to `initial_state`, which is returned.
        state_v_first: Whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        ssm_state_indices: `[N]`, the page of each sequence, or `[N, tokens]`, one for the state
            after each token. Page 0 is a page as any other. Pages that are written are distinct.
        num_accepted_tokens: `[N]`: the sequence continues from column `num_accepted_tokens - 1`.
        use_qk_l2norm_in_kernel: Whether q and k are normalized here.
        use_gate_in_kernel: Whether `g` goes through the gate here.
        use_beta_sigmoid_in_kernel: Whether `beta` goes through its sigmoid here.
        allow_neg_eigval: Whether beta is doubled after its sigmoid.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        out: Shape of v, receives the result.
        **kwargs: None are known.

    Returns:
        `o [B, T, HV, V]`, and the final state, `initial_state` or None.

    Raises:
        ValueError: A `beta` per channel, `ssm_state_indices` without `inplace_final_state`, or what
            the operators refuse.
        TypeError: An argument that is not known.
    """
    _check_names(kwargs)
    if beta.dim() == v.dim():
        raise ValueError(
            f"beta must have shape {tuple(v.shape[:3])}, one per head, got {tuple(beta.shape)}"
        )
    if inplace_final_state and initial_state is None:
        raise ValueError("initial_state must be given with inplace_final_state")
    if ssm_state_indices is not None and not inplace_final_state:
        raise ValueError("inplace_final_state must be True with ssm_state_indices")
    if use_qk_l2norm_in_kernel:
        q, k = normalized(q), normalized(k)
    if use_gate_in_kernel:
        g = gate(g, A_log, dt_bias, lower_bound=lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = _sigmoid(beta, 2.0 if allow_neg_eigval else 1.0)

    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, V, K = v.shape[2], v.shape[3], q.shape[3]
    states = _to_v_first(initial_state, state_v_first)
    # the operator takes page 0 for nobody's, so pages are copied behind an empty one
    table = torch.arange(1, N + 1, device=q.device)
    if states is None:
        pages = q.new_zeros(N + 1, HV, V, K, dtype=accumulation_dtype(q))
    elif ssm_state_indices is None:
        pages = F.pad(states, (0, 0) * 3 + (1, 0))
    else:
        pages = F.pad(states[ssm_state_indices.reshape(-1)], (0, 0) * 3 + (1, 0))
        table = torch.arange(1, pages.shape[0], device=q.device).view(ssm_state_indices.shape)
    o = recurrent_kda(
        q, k, v, g, beta, pages, table, num_accepted=num_accepted_tokens, scale=scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    final: Tensor | None = None
    if states is not None and inplace_final_state:
        if ssm_state_indices is None:
            states.copy_(pages[1:])
        else:
            states[ssm_state_indices.reshape(-1)] = pages[1:]
        final = initial_state
    elif output_final_state:
        final = _from_v_first(pages[1:], state_v_first)
    if out is not None:
        o = out.copy_(o)
    return o, final


def _check_beta(allow_neg_eigval: bool, use_beta_sigmoid_in_kernel: bool) -> None:
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("use_beta_sigmoid_in_kernel must be True with allow_neg_eigval")


def _sigmoid(beta: Tensor, scale: float) -> Tensor:
    return torch.sigmoid(beta.to(accumulation_dtype(beta))) * scale


def _to_v_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state if state is None or v_first else state.transpose(-1, -2)


def _from_v_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state if state is None or v_first else state.transpose(-1, -2).contiguous()


# ---------------------------------------------------------------------- gate and norms


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fla.ops.kda.gate.fused_kda_gate`.

    Args:
        g: `[..., HV, K]`, the gate's input.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        output_dtype: The dtype of the result.

    Returns:
        `[..., HV, K]` in nats.

    Raises:
        ValueError: What `kda_ops.gate` refuses.
    """
    return gate(g, A_log, dt_bias, lower_bound=lower_bound).to(output_dtype)


def kda_gate_chunk_cumsum(
    g: Tensor,
    A_log: Tensor | None,
    chunk_size: int,
    scale: float | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float,
    chunk_indices: Tensor | None = None,
    lower_bound: float | None = None,
    use_graph: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`fla.ops.kda.gate.kda_gate_chunk_cumsum`; unlike FLA's it has a gradient.

    Args:
        g: `[B, T, HV, K]`, the gate's input.
        A_log: `[HV]`.
        chunk_size: 64.
        scale: Scale of the result, which is in nats without one.
        dt_bias: `[HV * K]`.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        output_dtype: The dtype of the result, that of g if None.
        chunk_indices: Ignored: FLA's table has another size.
        lower_bound: None, or the gate's bound in `[-5, 0)` in nats.
        use_graph: Ignored.
        **kwargs: None are known.

    Returns:
        `[B, T, HV, K]`.

    Raises:
        ValueError: Another chunk size, or what the operators refuse.
        TypeError: An argument that is not known.
    """
    _check_names(kwargs)
    _check_offered(chunk_size=chunk_size)
    nats = gate(g, A_log, dt_bias, lower_bound=lower_bound)
    sums = chunk_cumsum(nats, scale=1.0 if scale is None else scale, cu_seqlens=cu_seqlens)
    return sums.to(g.dtype if output_dtype is None else output_dtype)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`fla.modules.norm.l2norm.l2norm`.

    Args:
        x: `[..., K]`.
        eps: Added to the sum of squares.
        output_dtype: The dtype of the result, that of x if None.

    Returns:
        `[..., K]`.
    """
    dtype = x.dtype if output_dtype is None else output_dtype
    return normalized(x.to(torch.promote_types(x.dtype, dtype)), eps=eps).to(dtype)


def fused_rms_norm_gated_forward(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fla.modules.FusedRMSNormGated.forward`, with a SiLU or a sigmoid.

    Args:
        self: The module.
        x: `[..., V]`.
        g: `[..., V]`, the output gate before its activation.
        residual: `[..., V]`, added to x before the norm.
        prenorm: Whether to return the sum too.
        residual_in_fp32: Whether the sum is fp32 without a residual.

    Returns:
        `[..., V]` in the dtype of x, with `prenorm` also the sum in the dtype of the residual.
    """
    dtype = accumulation_dtype(x)
    total = x if residual is None else x.to(dtype) + residual.to(dtype)
    silu = self.activation != "sigmoid"
    weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
    # the product of a SiLU is not rounded before its last factor
    y = rms_norm_gated(total.to(dtype) if silu else total, g, weight, eps=self.eps)
    y = (y * g.to(dtype) if silu else y).to(x.dtype)
    if not prenorm:
        return y
    kept = torch.float32 if residual_in_fp32 else x.dtype
    return y, total.to(kept if residual is None else residual.dtype)


# ---------------------------------------------------------------------- convolutions


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.causal_conv1d`: whole sequences, with gradients of everything.

    Args:
        x: `[B, T, D]`, or with D split in more axes.
        weight: `[D, W]`.
        bias: `[D]`.
        residual: Shape of x, added to the result.
        initial_state: `[N, D, W]`, the last W tokens before.
        output_final_state: Whether to return the last W tokens of each sequence.
        activation: `"silu"` (also called `"swish"`) or None.
        backend: Ignored, one of FLA's.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        cu_seqlens_cpu: Ignored.
        chunk_indices: Ignored.
        cp_context: Refused.
        **kwargs: `seq_idx`, ignored.

    Returns:
        The result in the shape of x, and `[N, D, W]` in its dtype or None.

    Raises:
        ValueError: No `weight`, `cp_context`, or what `kda_ops.short_conv` refuses.
        TypeError: An argument that is not known.
    """
    _check_names(kwargs, "seq_idx")
    _check_offered(cp_context)
    if backend not in CONV_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(CONV_BACKENDS)}, got {backend!r}")
    weight = _check_weight(weight)
    rows = x.flatten(2)
    history = None if initial_state is None else initial_state[..., 1:]  # FLA keeps one token more
    y = short_conv(
        rows, weight, bias, activation=activation, initial_state=history, cu_seqlens=cu_seqlens,
        layout="DS",
    ).reshape(x.shape)  # fmt: skip
    final = None
    if output_final_state:
        kept = None if initial_state is None else initial_state.mT
        final = last_rows(rows, weight.shape[-1], kept, cu_seqlens).mT.contiguous()
    return (y if residual is None else y + residual), final


def _check_weight(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("weight must be given, got None")
    return weight


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`fla.modules.causal_conv1d.causal_conv1d_update`: one token of each sequence.

    Args:
        x: `[N, D]`, `[N, 1, D]` or `[1, N, D]`, or with D split in more axes.
        cache: `[N, D, W]`, the last W tokens, written in place.
        residual: Shape of x, added to the result.
        weight: `[D, W]`.
        bias: `[D]`.
        activation: `"silu"` (also called `"swish"`) or None.

    Returns:
        The result in the shape of x, and the cache.

    Raises:
        ValueError: No `weight`, or an unknown activation.
    """
    weight = _check_weight(weight)
    window = torch.cat([cache[..., 1:], x.reshape(-1, weight.shape[0], 1).to(cache.dtype)], dim=-1)
    cache.copy_(window)
    dtype = accumulation_dtype(x)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    y = y if resolve_activation(activation) is None else F.silu(y)
    y = y.to(x.dtype).reshape(x.shape)
    return (y if residual is None else y + residual), cache


def short_convolution_forward(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.ShortConvolution.forward`; `x` is not multiplied by the mask in place.

    Args:
        self: The module.
        x: `[B, T, D]`.
        residual: Shape of x, added to the result.
        mask: `[B, T]`, 0 for padding.
        cache: `[N, D, W]`. Without autograd, a call of one token for every sequence writes it.
        output_final_state: Whether to return the last W tokens of each sequence.
        cu_seqlens: `[N + 1]`, offsets of sequences in one packed row.
        chunk_indices: Ignored.
        **kwargs: As `causal_conv1d`.

    Returns:
        The result in the shape of x, and `[N, D, W]` or None.

    Raises:
        ValueError: `mask` with `cu_seqlens`, or what `causal_conv1d` refuses.
    """
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError("mask must be None with cu_seqlens")
        x = x * mask.unsqueeze(-1)
    T = x.shape[1]
    written = cache if not torch.is_grad_enabled() else None
    if written is not None and cu_seqlens is None and T == 1:
        return self.step(x, residual, cache, output_final_state)
    y, final = causal_conv1d(
        x,
        self.weight.squeeze(1),
        self.bias,
        residual,
        cache,
        output_final_state or written is not None,
        self.activation,
        cu_seqlens=cu_seqlens,
        **kwargs,
    )
    if written is not None and cu_seqlens is not None and cu_seqlens.shape[0] - 1 == T:
        assert final is not None
        # whether each has one token is decided on the device, for a graph without a break
        each = (cu_seqlens.diff() == 1).all()
        written.copy_(torch.where(each, final.to(written.dtype), written))
    return y, final if output_final_state else None


def short_convolution_step(
    self: Any,
    x: Tensor,
    residual: Tensor | None,
    cache: Tensor | None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fla.modules.ShortConvolution.step`: one token of each sequence.

    Args:
        self: The module.
        x: `[N, 1, D]`, or with `cu_seqlens` `[1, N, D]`.
        residual: Shape of x, added to the result.
        cache: `[N, D, W]`, written in place; zeros if None.
        output_final_state: Whether to return the cache.
        cu_seqlens: `[N + 1]`.

    Returns:
        The result in the shape of x, and the cache or None.
    """
    weight = self.weight.squeeze(1)
    if cache is None:
        cache = x.new_zeros(x.shape[0] * x.shape[1], *weight.shape)
    y, cache = causal_conv1d_update(x, cache, residual, weight, self.bias, self.activation)
    return y, cache if output_final_state else None


# ---------------------------------------------------------------------- padding


def unpad_hidden_states(
    hidden_states: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    q_len: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """FLA's, for its KDA layer, in tensors of a fixed size: padding goes after the last sequence.

    Args:
        hidden_states: `[B, T, D]`.
        cu_seqlens: Given, nothing is packed.
        attention_mask: `[B, S]`, 0 for padding, of which the last `q_len` columns are used.
        q_len: T.

    Returns:
        `[1, B * T, D]`, the row of each token there (`[B * T]`, beyond the last one for padding),
        and `cu_seqlens`.
    """
    if cu_seqlens is not None or attention_mask is None:
        return hidden_states, None, cu_seqlens
    real = attention_mask[:, -q_len:] != 0
    flat = real.flatten()
    rows = flat.numel()
    place = torch.where(flat, flat.cumsum(0) - 1, rows)
    packed = hidden_states.new_zeros(rows + 1, hidden_states.shape[-1])
    packed = packed.index_copy(0, place, hidden_states.flatten(0, 1))
    lengths = real.sum(-1, dtype=torch.int32)
    return packed[None, :-1], place, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def repad_hidden_states(
    hidden_states: Tensor, indices: Tensor | None, batch_size: int, q_len: int
) -> Tensor:
    """The inverse of `unpad_hidden_states`.

    Args:
        hidden_states: `[1, B * T, D]`.
        indices: `[B * T]`, or None, and nothing is done.
        batch_size: B.
        q_len: T.

    Returns:
        `[B, T, D]`, zeros for padding.
    """
    if indices is None:
        return hidden_states
    padded = F.pad(hidden_states[0], (0, 0, 0, 1))
    return padded[indices].unflatten(0, (batch_size, q_len))
