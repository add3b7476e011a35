"""Argument checks that more than one operator uses.

Every error names the argument, what was expected and what came.

The functions without `_values` look at shapes, dtypes and devices only and run in traced code.
Those with `_values` read tensor contents; they are passed to `define_op(check_values=...)` and
never run while tracing.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_HEAD_DIM = 256
STATES = (torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Any) -> None:
    """`x` is a tensor; every check of a shape, dtype or device begins with it."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def check_integer(name: str, value: Any) -> None:
    if not hasattr(type(value), "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_number(name: str, value: Any) -> None:
    if not hasattr(type(value), "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_shape(name: str, x: Tensor, *allowed: Sequence[int]) -> None:
    """`x.shape` is one of `allowed`."""
    check_tensor(name, x)
    if not any(tuple(x.shape) == tuple(shape) for shape in allowed):
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def check_rank(name: str, x: Tensor, *ranks: int) -> None:
    check_tensor(name, x)
    if x.dim() not in ranks:
        expected = " or ".join(str(r) for r in ranks)
        raise ValueError(f"{name} must have {expected} dimensions, got shape {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    check_tensor(name, x)
    if x.dtype not in allowed:
        expected = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(
            f"{name} must have dtype {expected}, got {str(x.dtype).removeprefix('torch.')}"
        )


def check_kernel_dtype(name: str, x: Tensor) -> None:
    """Kernels compute in fp32: fp64 is for the CPU, and no fp64 result comes from them."""
    if x.dtype is torch.float64:
        raise ValueError(
            f"{name} must have dtype float16, bfloat16 or float32 on a GPU, got float64"
        )


def check_device(**tensors: Tensor | None) -> None:
    """All given tensors are on the device of the first one."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensor(name, x)
        if first is None:
            first = (name, x)
        elif x.device != first[1].device:
            raise ValueError(f"{name} must be on {first[1].device} like {first[0]}, got {x.device}")


def check_head_dim(name: str, size: int) -> None:
    """`size`, a head's width, is one that the kernels take."""
    check_integer(name, size)
    if not 1 <= size <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must be in [1, {MAX_HEAD_DIM}], got {size}")


def check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not value >= 0:  # NaN too
        raise ValueError(f"{name} must not be negative, got {value}")


def check_lower_bound(lower_bound: float | None) -> None:
    if lower_bound is None:
        return
    check_number("lower_bound", lower_bound)
    if not -5.0 <= lower_bound < 0.0:
        raise ValueError(f"lower_bound must be None or in [-5, 0), got {lower_bound}")


def check_gate_parameters(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    name: str = "x",
) -> None:
    """The arguments of the gate, `x [..., HV, K]`, which the caller knows by `name`."""
    check_dtype(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [..., HV, K], got {tuple(x.shape)}")
    HV, K = x.shape[-2], x.shape[-1]
    if A_log is not None:
        check_shape("A_log", A_log, (HV,))
        check_dtype("A_log", A_log)
    elif lower_bound is None:
        raise ValueError("A_log must be given unless lower_bound is, got None")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (HV, K), (HV * K,))
        check_dtype("dt_bias", dt_bias)
    check_lower_bound(lower_bound)
    check_device(**{name: x, "A_log": A_log, "dt_bias": dt_bias})


def check_chunk_size(chunk_size: int) -> None:
    check_integer("chunk_size", chunk_size)
    if chunk_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_size must be a power of two from 16 to 256, got {chunk_size}")


def check_varlen(
    name: str, x: Tensor, cu_seqlens: Tensor | None, chunks: Tensor | None, chunk_size: int
) -> None:
    """`x [B, T, ...]` with optional `cu_seqlens [N + 1]` and the chunk table of that batch."""
    if cu_seqlens is None:
        if chunks is not None:
            raise ValueError("chunks must come with cu_seqlens, got chunks alone")
        return
    check_cu_seqlens_shape(cu_seqlens)
    check_device(**{name: x, "cu_seqlens": cu_seqlens, "chunks": chunks})
    if x.shape[0] != 1:
        raise ValueError(f"{name} must have batch size 1 with cu_seqlens, got {x.shape[0]}")
    if chunks is not None:
        check_chunks_shape(chunks, cu_seqlens.shape[0] - 1, x.shape[1], chunk_size)


def check_chunks_shape(chunks: Tensor, sequences: int, total_tokens: int, chunk_size: int) -> None:
    check_dtype("chunks", chunks, (torch.int32,))
    check_shape("chunks", chunks, (total_tokens // chunk_size + sequences, 2))


def check_cu_seqlens_shape(cu_seqlens: Tensor) -> None:
    check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [N + 1], got {tuple(cu_seqlens.shape)}")


def check_cu_seqlens_values(cu_seqlens: Tensor, total_tokens: int) -> None:
    """First 0, non-decreasing, last at most `total_tokens`."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease, got {a} then {b} at position {n + 1}")
    if offsets[-1] > total_tokens:
        raise ValueError(
            f"cu_seqlens must end at or before {total_tokens} tokens, got {offsets[-1]}"
        )


def check_writable(**states: Tensor | None) -> None:
    """PyTorch lets states that were made in inference mode be written there only."""
    if torch.is_inference_mode_enabled():
        return
    for name, x in states.items():
        if x is not None and x.is_inference():
            raise RuntimeError(
                f"{name} was made under torch.inference_mode(): it can be written only there"
            )


def check_varlen_values(
    x: Tensor, cu_seqlens: Tensor | None, chunks: Tensor | None, chunk_size: int
) -> None:
    """Contents of `cu_seqlens` for `x [1, T, ...]`, and of the chunk table."""
    if cu_seqlens is None:
        return
    check_cu_seqlens_values(cu_seqlens, x.shape[1])
    if chunks is not None:
        check_chunk_values(chunks, cu_seqlens, x.shape[1], chunk_size)


def check_chunk_values(
    chunks: Tensor, cu_seqlens: Tensor, total_tokens: int, chunk_size: int
) -> None:
    """`chunks` is the chunk table of right `cu_seqlens`."""
    from kda_ops.chunks import chunk_table

    expected = chunk_table(cu_seqlens, total_tokens, chunk_size)
    wrong = (expected != chunks).any(dim=1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"chunks must be the chunk table of cu_seqlens, expected row {row} to be "
            f"{expected[row].tolist()}, got {chunks[row].tolist()}"
        )


def check_slot_values(name: str, slots: Tensor, num_slots: int) -> None:
    """Every slot is in `[0, num_slots)`."""
    bad = ((slots < 0) | (slots >= num_slots)).flatten().nonzero()
    if len(bad):
        raise ValueError(f"{name} must be in [0, {num_slots}), got {int(slots.flatten()[bad[0]])}")


def check_distinct_slots(name: str, slots: Tensor) -> None:
    """No slot but the null block occurs twice: two sequences would write it at once."""
    used = sorted(slot for slot in slots.flatten().tolist() if slot != 0)
    for slot, following in itertools.pairwise(used):
        if slot == following:
            raise ValueError(f"{name} must not repeat, got {slot} more than once")


def resolve_activation(activation: str | None) -> str | None:
    """`"silu"` or None."""
    if activation not in ("silu", "swish", None):
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")
    return None if activation is None else "silu"


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The arguments of a depthwise convolution over `x [..., D]`."""
    check_dtype("x", x)
    if x.shape[-1] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    check_rank("weight", weight, 2)
    if weight.shape[1] < 2:
        raise ValueError(
            f"weight must have shape [D, W] with W at least 2, got {tuple(weight.shape)}"
        )
    check_shape("weight", weight, (x.shape[-1], weight.shape[1]))
    check_dtype("weight", weight)
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))
        check_dtype("bias", bias)


def check_conv_state(conv_state: Tensor, layout: str, D: int, W: int) -> None:
    """A convolution state of D channels that holds at least the W - 1 rows of a history."""
    check_dtype("conv_state", conv_state)
    check_rank("conv_state", conv_state, 3)
    dims, L = (conv_state.shape[2], conv_state.shape[1]) if layout == "SD" else conv_state.shape[1:]
    if dims != D or L < W - 1:
        axes = f"[slots, L, {D}]" if layout == "SD" else f"[slots, {D}, L]"
        raise ValueError(
            f"conv_state must have shape {axes} with L at least {W - 1} in layout {layout}, "
            f"got {tuple(conv_state.shape)}"
        )


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> None:
    """Shapes and dtypes of `q, k [B, T, H, K]`, `v [B, T, HV, V]` and `beta [B, T, HV]`."""
    check_rank("q", q, 4)
    check_dtype("q", q)
    check_rank("v", v, 4)
    B, T, H, K = q.shape
    HV, V = v.shape[2], v.shape[3]
    check_shape("k", k, (B, T, H, K))
    check_dtype("k", k, (q.dtype,))
    check_shape("v", v, (B, T, HV, V))
    check_dtype("v", v, (q.dtype,))
    if H < 1 or HV < 1 or HV % H:
        raise ValueError(f"v must have a multiple of the {H} heads of q, got {HV}")
    for name, size in (("q", K), ("v", V)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dimension in [1, {MAX_HEAD_DIM}], got {size}"
            )
    check_shape("beta", beta, (B, T, HV))
    check_dtype("beta", beta, FLOATS)


def check_chunk_states(
    q: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    state: Tensor | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The states of whole sequences: initial and final ones, or paged ones written in place."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, V, K = v.shape[2], v.shape[3], q.shape[3]
    if state is None:
        if state_indices is not None:
            raise ValueError("state_indices must come with state, got state_indices alone")
        if has_initial_state is not None:
            raise ValueError("has_initial_state must come with state, got has_initial_state alone")
        if initial_state is not None:
            check_shape("initial_state", initial_state, (N, HV, V, K))
            check_dtype("initial_state", initial_state, STATES)
            check_device(q=q, initial_state=initial_state)
        return
    if initial_state is not None:
        raise ValueError("initial_state must be None with state, which holds the initial states")
    if output_final_state:
        raise ValueError(
            "output_final_state must be False with state, which receives the final states"
        )
    if state_indices is None:
        raise ValueError("state_indices must be given with state, got None")
    check_rank("state", state, 4)
    check_shape("state", state, (state.shape[0], HV, V, K))
    check_dtype("state", state, STATES)
    check_shape("state_indices", state_indices, (N,))
    check_dtype("state_indices", state_indices, INTEGERS)
    if has_initial_state is not None:
        check_shape("has_initial_state", has_initial_state, (N,))
        check_dtype("has_initial_state", has_initial_state, (torch.bool,))
    check_device(q=q, state=state, state_indices=state_indices, has_initial_state=has_initial_state)


def check_conv_sequences(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
) -> None:
    """The arguments of a convolution of whole sequences `x [B, T, D]` or `[T, D]`, with a state or
    without.
    """
    check_conv(x, weight, bias)
    sequences = 1 if x.dim() == 2 else x.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens_shape(cu_seqlens)
        if sequences != 1:
            raise ValueError(f"x must have batch size 1 with cu_seqlens, got {sequences}")
        sequences = cu_seqlens.shape[0] - 1
    if conv_state is None:
        for name, value in (("slots", slots), ("has_initial_state", has_initial_state)):
            if value is not None:
                raise ValueError(f"{name} must come with conv_state, got {name} alone")
    else:
        check_conv_state(conv_state, layout, x.shape[-1], weight.shape[1])
        if slots is None:
            raise ValueError("slots must be given with conv_state, got None")
        check_dtype("slots", slots, INTEGERS)
        check_shape("slots", slots, (sequences,))
    if has_initial_state is not None:
        check_dtype("has_initial_state", has_initial_state, (torch.bool,))
        check_shape("has_initial_state", has_initial_state, (sequences,))
    check_device(
        x=x,
        weight=weight,
        bias=bias,
        conv_state=conv_state,
        slots=slots,
        has_initial_state=has_initial_state,
        cu_seqlens=cu_seqlens,
    )


def state_channels(x: Any, conv_state: Any) -> tuple[Tensor | None, int]:
    """A convolution state and its channels, from which an unknown layout can be told; of q where q,
    k and v are apart.
    """
    if isinstance(x, (tuple, list)) and isinstance(conv_state, (tuple, list)):
        x, conv_state = x[0], conv_state[0]
    known = isinstance(x, Tensor) and isinstance(conv_state, Tensor) and x.dim() > 0
    return (conv_state, x.shape[-1]) if known else (None, 0)


def conv_parts(
    x: Any, weight: Any, bias: Any, conv_state: Any, layout: str
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """`(x, weight, bias, conv_state)` of q | k | v together, or of each of q, k and v where every
    argument is three tensors.

    What a kernel takes as one is checked: three of an argument agree in dtype, the inputs in their
    tokens, the weights in their taps, the states in slots, rows and the distance of channels.
    """
    given = {"x": x, "weight": weight, "bias": bias, "conv_state": conv_state}
    if not any(isinstance(value, (tuple, list)) for value in given.values()):
        return [(x, weight, bias, conv_state)]
    for name, value in given.items():
        if value is None and name in ("bias", "conv_state"):
            given[name] = (None, None, None)
        elif not isinstance(value, (tuple, list)) or len(value) != 3:
            raise ValueError(
                f"{name} must be three tensors, of q, k and v, like the other arguments, "
                f"got {type(value).__name__}"
            )
        elif not all(isinstance(part, Tensor) for part in value):
            kinds = ", ".join(type(part).__name__ for part in value)
            raise ValueError(f"{name} must be three tensors, got {kinds}")
        else:
            for part in value[1:]:
                check_rank(name, part, value[0].dim())
                check_dtype(name, part, (value[0].dtype,))
            check_device(**{f"{name} of {y}": part for y, part in zip("qkv", value, strict=True)})
    check_rank("x", x[0], 2, 3)
    check_rank("weight", weight[0], 2)
    for part in x[1:]:
        check_shape("x", part, (*x[0].shape[:-1], part.shape[-1]))
    for part in weight[1:]:
        check_shape("weight", part, (part.shape[0], *weight[0].shape[1:]))
    if conv_state is not None:
        rows, dim = (1, 2) if layout == "SD" else (2, 1)
        first = conv_state[0]
        check_rank("conv_state", first, 3)
        for part in conv_state[1:]:
            if (part.shape[0], part.shape[rows]) != (first.shape[0], first.shape[rows]):
                raise ValueError(
                    f"conv_state must have as many slots and rows for q, k and v, "
                    f"got {tuple(first.shape)} and {tuple(part.shape)} in layout {layout}"
                )
            if part.stride(dim) != first.stride(dim):
                raise ValueError(
                    f"conv_state must have one stride along the channels of q, k and v, "
                    f"got {first.stride(dim)} and {part.stride(dim)}"
                )
    return list(zip(*given.values(), strict=True))


def check_conv_values(
    x: Tensor, cu_seqlens: Tensor | None, conv_state: Tensor | None, slots: Tensor | None
) -> None:
    """Contents of the offsets and slots of a convolution of whole sequences."""
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x.shape[-2])
    if conv_state is not None and slots is not None:
        check_slot_values("slots", slots, conv_state.shape[0])
        check_distinct_slots("slots", slots)


def check_step_values(
    state: Tensor,
    state_indices: Tensor,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    total_tokens: int,
) -> None:
    """Contents of the tables of a step on paged states: slots, counts and offsets."""
    check_slot_values("state_indices", state_indices, state.shape[0])
    table = state_indices if state_indices.dim() == 2 else state_indices[:, None]
    owners: dict[int, int] = {}
    for n, slots in enumerate(table.tolist()):
        for slot in set(slots) - {0}:
            if owners.setdefault(slot, n) != n:
                raise ValueError(
                    f"state_indices must not share a slot between sequences, "
                    f"got slot {slot} for sequences {owners[slot]} and {n}"
                )
    columns = table.shape[1]
    if num_accepted is not None:
        padding = (table == 0).all(dim=1)
        bad = (((num_accepted < 1) | (num_accepted > columns)) & ~padding).nonzero()
        if len(bad):
            got = int(num_accepted[bad[0]])
            raise ValueError(f"num_accepted must be in [1, {columns}], got {got}")
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, total_tokens)
        longest = max(cu_seqlens.diff().tolist(), default=0)
        if state_indices.dim() == 2 and longest > columns:
            raise ValueError(
                f"cu_seqlens must have at most {columns} tokens per sequence, one per column of "
                f"state_indices, got {longest}"
            )
