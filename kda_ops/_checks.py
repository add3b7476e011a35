"""Argument checks that more than one operator uses.

Every error names the argument, what was expected and what was passed.

Functions without `_values` check only shapes, dtypes and devices, and run in traced code. Those
with `_values` read tensor contents; they are passed to `define_op(check_values=...)` and never run
while tracing.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
STATES = (torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def check_tensor(name: str, x: Any) -> None:
    """`x` is a tensor; every check of a shape, dtype or device starts here."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def check_integer(name: str, value: Any) -> None:
    if not hasattr(type(value), "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_at_least(name: str, value: Any, least: int) -> None:
    check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_multiple(name: str, value: int, of: str, unit: int) -> None:
    """`value` is a multiple of `unit`, the value of the argument `of`."""
    if value % unit:
        raise ValueError(f"{name} must be a multiple of {of} = {unit}, got {value}")


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
    """Kernels compute in fp32, so fp64 is for the CPU only."""
    if x.dtype is torch.float64:
        raise ValueError(
            f"{name} must have dtype float16, bfloat16 or float32 on a GPU, got float64"
        )


def check_device(**tensors: Tensor | None) -> None:
    """All tensors are on the device of the first one."""
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
    """`size`, a head dimension, is supported by the kernels."""
    check_integer(name, size)
    if not 1 <= size <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must be in [1, {MAX_HEAD_DIM}], got {size}")


def check_width(name: str, size: int) -> None:
    """`size` is the head dimension of a tensor; see `check_head_dim`."""
    if not 1 <= size <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head dimension in [1, {MAX_HEAD_DIM}], got {size}")


def check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not value >= 0:  # NaN too
        raise ValueError(f"{name} must not be negative, got {value}")


def check_beta_scale(beta_scale: float) -> None:
    if beta_scale not in (1.0, 2.0):
        raise ValueError(f"beta_scale must be 1 or 2, got {beta_scale}")


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
    name: str = "raw_gate",
) -> None:
    """The arguments of the gate; errors call `x [..., HV, K]` by `name`."""
    check_dtype(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [..., HV, K], got {tuple(x.shape)}")
    HV, K = x.shape[-2], x.shape[-1]
    if A_log is not None:
        check_shape("A_log", A_log, (HV,), (1, 1, HV, 1))
        check_dtype("A_log", A_log)
    elif lower_bound is None:
        raise ValueError("A_log must be given unless lower_bound is, got None")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (HV, K), (HV * K,))
        check_dtype("dt_bias", dt_bias)
    check_lower_bound(lower_bound)
    check_device(**{name: x, "A_log": A_log, "dt_bias": dt_bias})


def rates_of(A_log: Tensor | None) -> Tensor | None:
    """`A_log [HV]`, of itself or of `[1, 1, HV, 1]`, as FLA and transformers keep it."""
    return A_log if A_log is None or A_log.dim() == 1 else A_log.reshape(-1)


def check_chunk_size(chunk_size: int) -> None:
    check_integer("chunk_size", chunk_size)
    if chunk_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_size must be a power of two from 16 to 256, got {chunk_size}")


def check_varlen(
    name: str, x: Tensor, cu_seqlens: Tensor | None, chunk_indices: Tensor | None, chunk_size: int
) -> None:
    """`x [B, T, ...]` with optional `cu_seqlens [N + 1]` and the chunk table of that batch."""
    if cu_seqlens is None:
        if chunk_indices is not None:
            raise ValueError("chunk_indices must come with cu_seqlens, got chunk_indices alone")
        return
    check_cu_seqlens_shape(cu_seqlens)
    check_device(**{name: x, "cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices})
    if x.shape[0] != 1:
        raise ValueError(f"{name} must have batch size 1 with cu_seqlens, got {x.shape[0]}")
    if chunk_indices is not None:
        check_chunk_indices_shape(chunk_indices, cu_seqlens.shape[0] - 1, x.shape[1], chunk_size)


def check_chunk_indices_shape(
    chunk_indices: Tensor, sequences: int, total_tokens: int, chunk_size: int
) -> None:
    check_dtype("chunk_indices", chunk_indices, (torch.int32,))
    check_shape("chunk_indices", chunk_indices, (total_tokens // chunk_size + sequences, 2))


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
    """PyTorch allows writes to tensors made in inference mode only in inference mode."""
    if torch.is_inference_mode_enabled():
        return
    for name, x in states.items():
        if x is not None and x.is_inference():
            raise RuntimeError(
                f"{name} was made under torch.inference_mode(): it can be written only there"
            )


def check_state_layout(state_layout: str) -> None:
    if state_layout not in ("VK", "KV"):
        raise ValueError(f"state_layout must be 'VK' or 'KV', got {state_layout!r}")


def check_state(name: str, state: Tensor, pages: int, HV: int, V: int, K: int, layout: str) -> None:
    """Recurrent states `[pages, HV, V, K]`, or `[pages, HV, K, V]` in state layout KV."""
    check_state_layout(layout)
    check_rank(name, state, 4)
    last = (V, K) if layout == "VK" else (K, V)
    if tuple(state.shape) != (pages, HV, *last):
        raise ValueError(
            f"{name} must have shape {[pages, HV, *last]} in state_layout {layout}, "
            f"got {tuple(state.shape)}"
        )
    check_dtype(name, state, STATES)


def check_paged_state(state: Tensor, HV: int, V: int, K: int, layout: str) -> None:
    """Recurrent states with any number of pages; see `check_state`."""
    check_rank("state", state, 4)
    check_state("state", state, state.shape[0], HV, V, K, layout)


def check_pages(name: str, state: Tensor, state_indices: Tensor | None, sequences: int) -> None:
    """Without `state_indices`, sequence n is on page n, which there must be."""
    if state_indices is None and state.shape[0] < sequences:
        raise ValueError(
            f"{name} must have a page for each of {sequences} sequences without state_indices, "
            f"got shape {tuple(state.shape)}"
        )


def check_slot_table(state_indices: Tensor | None, sequences: int, fewest_columns: int = 1) -> None:
    """Slots `[N]` or `[N, columns]`, or None."""
    if state_indices is None:
        return
    check_dtype("state_indices", state_indices, INTEGERS)
    check_rank("state_indices", state_indices, 1, 2)
    if state_indices.dim() == 1:
        check_shape("state_indices", state_indices, (sequences,))
        return
    columns = state_indices.shape[1]
    check_shape("state_indices", state_indices, (sequences, columns))
    if columns < fewest_columns:
        raise ValueError(
            f"state_indices must have a column for each of {fewest_columns} tokens, got {columns}"
        )


def check_accepted(num_accepted: Tensor, sequences: int) -> None:
    """Counts `[N]`."""
    check_shape("num_accepted", num_accepted, (sequences,))
    check_dtype("num_accepted", num_accepted, INTEGERS)


def check_step_tables(
    state_indices: Tensor | None, num_accepted: Tensor | None, sequences: int,
    fewest_columns: int = 1,
) -> None:  # fmt: skip
    """The tables of a step on paged states; each column is a token."""
    check_slot_table(state_indices, sequences, fewest_columns)
    if num_accepted is None:
        return
    if state_indices is None or state_indices.dim() == 1:
        raise ValueError(
            "num_accepted must come with state_indices of shape [N, 1 + num_spec], "
            f"got {None if state_indices is None else tuple(state_indices.shape)}"
        )
    check_accepted(num_accepted, sequences)


def check_slot_values(name: str, slots: Tensor, num_slots: int) -> None:
    """Every slot is below `num_slots`; 0 and negative ones are padding."""
    bad = (slots >= num_slots).flatten().nonzero()
    if len(bad):
        raise ValueError(f"{name} must be below {num_slots}, got {int(slots.flatten()[bad[0]])}")


def check_distinct_slots(name: str, slots: Tensor) -> None:
    """Slots are unique, except those of padding: else two sequences would write the same one."""
    used = sorted(slot for slot in slots.flatten().tolist() if slot > 0)
    for slot, following in itertools.pairwise(used):
        if slot == following:
            raise ValueError(f"{name} must not repeat, got {slot} more than once")


def check_unshared_slots(table: Tensor) -> None:
    """No two sequences of `state_indices [N, columns]` share a slot, except those of padding."""
    owners: dict[int, int] = {}
    for n, slots in enumerate(table.tolist()):
        for slot in set(slots):
            if slot > 0 and owners.setdefault(slot, n) != n:
                raise ValueError(
                    f"state_indices must not share a slot between sequences, "
                    f"got slot {slot} for sequences {owners[slot]} and {n}"
                )


def check_accepted_values(name: str, counts: Tensor, most: int, ignored: Tensor) -> None:
    """Accepted tokens of each sequence that is not `ignored`."""
    bad = ((counts < 1) | (counts > most)) & ~ignored
    if bad.any():
        raise ValueError(f"{name} must be in [1, {most}], got {int(counts[bad][0])}")


def check_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, beta_name: str = "beta"
) -> None:
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
    check_width("q", K)
    check_width("v", V)
    check_shape(beta_name, beta, (B, T, HV))
    check_dtype(beta_name, beta, FLOATS)


def check_chunk_states(
    q: Tensor, v: Tensor, initial_state: Tensor | None, output_final_state: bool,
    state: Tensor | None, state_indices: Tensor | None, has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None, state_layout: str,
) -> None:  # fmt: skip
    """The states of whole sequences: initial and final, or paged and written in place."""
    check_state_layout(state_layout)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, V, K = v.shape[2], v.shape[3], q.shape[3]
    if state is None:
        if state_indices is not None:
            raise ValueError("state_indices must come with state, got state_indices alone")
        if has_initial_state is not None:
            raise ValueError("has_initial_state must come with state, got has_initial_state alone")
        if initial_state is not None:
            check_state("initial_state", initial_state, N, HV, V, K, state_layout)
            check_device(q=q, initial_state=initial_state)
        return
    if initial_state is not None:
        raise ValueError("initial_state must be None with state, which holds the initial states")
    if output_final_state:
        raise ValueError(
            "output_final_state must be False with state, which receives the final states"
        )
    check_paged_state(state, HV, V, K, state_layout)
    check_pages("state", state, state_indices, N)
    if state_indices is not None:
        check_shape("state_indices", state_indices, (N,))
        check_dtype("state_indices", state_indices, INTEGERS)
    if has_initial_state is not None:
        check_shape("has_initial_state", has_initial_state, (N,))
        check_dtype("has_initial_state", has_initial_state, (torch.bool,))
    check_device(q=q, state=state, state_indices=state_indices, has_initial_state=has_initial_state)


def check_page_values(state: Tensor, state_indices: Tensor | None) -> None:
    """Slots `[N]` of whole sequences."""
    if state_indices is not None:
        check_slot_values("state_indices", state_indices, state.shape[0])
        check_distinct_slots("state_indices", state_indices)


def check_step_values(
    state: Tensor, state_indices: Tensor | None, num_accepted: Tensor | None,
    cu_seqlens: Tensor | None, total_tokens: int,
) -> None:  # fmt: skip
    """Contents of the tables of a step on paged states: slots, counts and offsets."""
    if state_indices is None:
        if cu_seqlens is not None:
            check_cu_seqlens_values(cu_seqlens, total_tokens)
        return
    check_slot_values("state_indices", state_indices, state.shape[0])
    table = state_indices if state_indices.dim() == 2 else state_indices[:, None]
    check_unshared_slots(table)
    columns = table.shape[1]
    if num_accepted is not None:
        check_accepted_values("num_accepted", num_accepted, columns, (table <= 0).all(dim=1))
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, total_tokens)
        longest = max(cu_seqlens.diff().tolist(), default=0)
        if state_indices.dim() == 2 and longest > columns:
            raise ValueError(
                f"cu_seqlens must have at most {columns} tokens per sequence, one per column of "
                f"state_indices, got {longest}"
            )
