"""A whole decode step in C++: arguments as those of the operators."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kda_ops.native import InvalidValues, address, dense, fp32, kernel

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Channels(ctypes.Structure):
    """`Channels` of decode.cpp."""

    _fields_ = (
        ("x", c_void_p),
        ("x_token", c_int64),
        ("state", c_void_p),
        *((name, c_int64) for name in ("state_slot", "state_row", "state_channel")),
        *((name, c_void_p) for name in ("weight", "bias")),
    )


class _Integers(ctypes.Structure):
    """`Integers` of decode.cpp."""

    _fields_ = (("data", c_void_p), ("wide", c_int64))


class _Gate(ctypes.Structure):
    """`Gate` of vectors.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("A_log", "dt_bias")),
        ("bounded", c_int64),
        ("bound", c_double),
    )


class _Step(ctypes.Structure):
    """`Step` of decode.cpp."""

    _fields_ = (
        ("channels", _Channels * 3),
        *((name, c_int64) for name in ("conv_dtype", "state_dtype")),
        *((name, c_int64) for name in ("T", "N", "H", "HV", "K", "V", "W", "L")),
        *((name, c_int64) for name in ("activated", "columns", "per_token")),
        *((name, _Integers) for name in ("slots", "accepted", "offsets")),
        ("gate", _Gate),
        *((name, c_void_p) for name in ("f", "beta", "z", "norm_weight", "state")),
        *((name, c_int64) for name in ("conv_slots", "state_slots", "slot", "head", "v", "k")),
        ("o", c_void_p),
        *((name, c_double) for name in ("beta_scale", "norm_eps", "qk_norm_eps", "scale")),
    )


def kda_decode(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *step: Any
) -> Tensor:
    """The arguments after the bias are those of `_run`."""
    f, z, layout = step[1], step[3], step[-1]
    value_dim = f.shape[-2] * z.shape[-1]
    key_dim = (x.shape[1] - value_dim) // 2
    sizes = [key_dim, key_dim, value_dim]
    biases = [None] * 3 if bias is None else bias.split(sizes)
    states = conv_state.split(sizes, 2 if layout == "SD" else 1)
    return _run(x.split(sizes, 1), states, weight.split(sizes), biases, *step)


def kda_decode_apart(*args: Any) -> Tensor:
    return _run(args[0:3], args[3:6], args[6:9], args[9:12], *args[12:])


def _run(
    xs: Any,
    conv_states: Any,
    weights: Any,
    biases: Any,
    activation: str | None,
    f: Tensor,
    beta: Tensor,
    z: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    norm_weight: Tensor,
    norm_eps: float,
    qk_norm_eps: float,
    scale: float,
    state: Tensor,
    state_indices: Tensor,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
) -> Tensor:
    T, (HV, K), V = xs[0].shape[0], f.shape[-2:], z.shape[-1]
    row, channel = (1, 2) if layout == "SD" else (2, 1)
    # converted tensors are kept by these names while the kernel reads them
    inputs, weights, biases = [fp32(x) for x in xs], list(map(dense, weights)), map(dense, biases)
    biases = list(biases)
    f, beta, z, norm_weight = map(dense, (f, beta, z, norm_weight))
    A_log, dt_bias = dense(A_log), dense(dt_bias)
    tables = [
        None if x is None else x.contiguous() for x in (state_indices, num_accepted, cu_seqlens)
    ]
    o = inputs[0].new_zeros(1, T, HV, V)
    channels = [
        _Channels(
            x.data_ptr(),
            x.stride(0),
            conv.data_ptr(),
            *(conv.stride(axis) for axis in (0, row, channel)),
            *(address(weight), address(bias)),
        )
        for x, conv, weight, bias in zip(inputs, conv_states, weights, biases, strict=True)
    ]
    step = _Step(
        (_Channels * 3)(*channels),
        *(_DTYPES[conv_states[0].dtype], _DTYPES[state.dtype]),
        *(T, len(state_indices), inputs[0].shape[1] // K, HV, K, V),
        *(weights[0].shape[1], conv_states[0].shape[row]),
        activation == "silu",
        *((1, 0) if state_indices.dim() == 1 else (state_indices.shape[1], 1)),
        *(_Integers(address(x), x is not None and x.dtype == torch.int64) for x in tables),
        _Gate(address(A_log), address(dt_bias), lower_bound is not None, lower_bound or 0.0),
        *map(address, (f, beta, z, norm_weight, state)),
        *(conv_states[0].shape[0], state.shape[0], *state.stride()),
        o.data_ptr(),
        *(beta_scale, norm_eps, qk_norm_eps, scale),
    )
    run = kernel("kda_decode", c_void_p, c_int64, result=c_int)
    if not run(ctypes.byref(step), torch.get_num_threads()):
        raise InvalidValues
    return o.to(xs[0].dtype)
