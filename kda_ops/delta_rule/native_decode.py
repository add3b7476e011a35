"""A whole decode step in C++: arguments as those of the operators."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kda_ops.delta_rule.state_layout import state_strides
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
        *((name, c_void_p) for name in ("f", "beta", "z", "norm_weight")),
        ("beta_token", c_int64),
        ("state", c_void_p),
        *((name, c_int64) for name in ("conv_slots", "state_slots", "slot", "head", "v", "k")),
        ("o", c_void_p),
        *((name, c_double) for name in ("beta_scale", "norm_eps", "qk_norm_eps", "scale")),
    )


def kda_decode(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *step: Any
) -> Tensor:
    """The arguments after the bias are those of `_run`."""
    f, z = step[1], step[3]
    key_dim = (x.shape[1] - f.shape[-2] * z.shape[-1]) // 2
    packed = (fp32(x), conv_state, dense(weight), dense(bias))
    o = _run([(*packed, first) for first in (0, key_dim, 2 * key_dim)], key_dim, *step)
    return o if o.dtype == x.dtype else o.to(x.dtype)


def kda_decode_unpacked(*args: Any) -> Tensor:
    xs, states, weights, biases, step = args[0:3], args[3:6], args[6:9], args[9:12], args[12:]
    parts = [
        (fp32(x), state, dense(weight), dense(bias), 0)
        for x, state, weight, bias in zip(xs, states, weights, biases, strict=True)
    ]
    return _run(parts, xs[0].shape[1], *step).to(xs[0].dtype)


def _run(
    parts: list[Any], key_dim: int, activation: str | None, f: Tensor, beta: Tensor, z: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None, beta_scale: float,
    norm_weight: Tensor, norm_eps: float, qk_norm_eps: float, scale: float, state: Tensor,
    state_indices: Tensor | None, num_accepted: Tensor | None, cu_seqlens: Tensor | None,
    state_layout: str, layout: str,
) -> Tensor:  # fmt: skip
    """The output in fp32. A part is its x, state, weight and bias, and its first channel in them.

    Tensors that are converted are kept under the names of the arguments while they are read.
    """
    x, conv_state, weight, *_ = parts[0]
    T, (HV, K), V = x.shape[0], f.shape[-2:], z.shape[-1]
    row, channel = (1, 2) if layout == "SD" else (2, 1)
    f, z, norm_weight, A_log, dt_bias = map(dense, (f, z, norm_weight, A_log, dt_bias))
    beta = fp32(beta.reshape(T, HV))  # a slice of a projection is read where it lies
    tables = [
        None if table is None else table.contiguous()
        for table in (state_indices, num_accepted, cu_seqlens)
    ]
    N = T if cu_seqlens is None else len(cu_seqlens) - 1
    columns = (
        state_indices.shape[1] if state_indices is not None and state_indices.dim() == 2 else 0
    )
    o = x.new_zeros(1, T, HV, V)
    channels: Any = (_Channels * 3)()
    for i, (x_i, state_i, weight_i, bias_i, first) in enumerate(parts):
        channels[i] = _channels(x_i, state_i, weight_i, bias_i, first, row, channel)
    step = _Step(
        channels, *(_DTYPES[conv_state.dtype], _DTYPES[state.dtype]),
        *(T, N, key_dim // K, HV, K, V), *(weight.shape[1], conv_state.shape[row]),
        activation == "silu",
        *(max(columns, 1), columns > 0),
        *((address(table), table is not None and table.dtype == torch.int64) for table in tables),
        (address(A_log), address(dt_bias), lower_bound is not None, lower_bound or 0.0),
        *map(address, (f, beta, z, norm_weight)), *(beta.stride(0), state.data_ptr()),
        *(conv_state.shape[0], state.shape[0]), *state_strides(state, state_layout=state_layout),
        o.data_ptr(),
        *(beta_scale, norm_eps, qk_norm_eps, scale),
    )  # fmt: skip
    run = kernel("kda_decode", c_void_p, c_int64, result=c_int)
    if not run(ctypes.byref(step), torch.get_num_threads()):
        raise InvalidValues
    return o


def _channels(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, first: int, row: int,
    channel: int,
) -> tuple[int | None, ...]:  # fmt: skip
    """`_Channels` from a part's first channel on."""
    strides = state.stride()
    return (
        x.data_ptr() + 4 * first,
        x.stride(0),
        state.data_ptr() + state.element_size() * first * strides[channel],
        *(strides[axis] for axis in (0, row, channel)),
        weight.data_ptr() + 4 * first * weight.shape[1],
        None if bias is None else bias.data_ptr() + 4 * first,
    )
