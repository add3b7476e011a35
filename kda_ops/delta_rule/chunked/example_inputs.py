"""Inputs of chunked KDA from raw inputs, for the cases of the operators that take them."""

from typing import Any

import torch
import torch.nn.functional as F

BF16 = torch.bfloat16


def chunk_kda_gated_inputs(
    device: torch.device,
    *,
    B: int = 1,
    T: int,
    H: int = 1,
    HV: int | None = None,
    K: int = 128,
    V: int = 128,
    dtype: torch.dtype = BF16,
    gate: str = "softplus",
    rate: bool = True,
    dt_bias: bool = True,
    norm: bool = False,
    size: float = 1.0,
    beta_scale: float = 1.0,
    scale: float | None = None,
    cu_seqlens: list[int] | None = None,
    index_dtype: torch.dtype = torch.int32,
    packed: bool = False,
) -> dict[str, Any]:
    """Arguments of `chunk_kda_gated`; rows past the last sequence are NaN.

    Args:
        device: Device of the tensors.
        B: Batch.
        T: Tokens.
        H: Query and key heads.
        HV: Value heads, H if None.
        K: Key dimension.
        V: Value dimension.
        dtype: Dtype of q, k, v, raw_gate and raw_beta.
        gate: `softplus` with rates 1 to 16 as in a trained model, `harsh` down to e^-60 and beyond
            in one token, `slow` near 1, or `bounded` at -5 nats.
        rate: Whether there is an `A_log`.
        dt_bias: Whether there is a `dt_bias`.
        norm: Whether the operator normalizes q and k.
        size: Magnitude of the elements of q and k, with `norm`.
        beta_scale: As in `chunk_kda_gated`.
        scale: As in `chunk_kda_gated`.
        cu_seqlens: Offsets of the sequences.
        index_dtype: Dtype of `cu_seqlens`.
        packed: Whether q, k, v and raw_gate are slices of one projection.
    """
    HV = HV or H
    q, k = (torch.randn(B, T, H, K, device=device) for _ in range(2))
    q, k = (size * y if norm else F.normalize(y, dim=-1) for y in (q, k))
    v = torch.randn(B, T, HV, V, device=device)
    raw_gate = torch.randn(B, T, HV, K, device=device) * (
        4.0 if gate in ("harsh", "bounded") else 1.0
    )
    raw_beta = torch.randn(B, T, HV, device=device)
    parts = [y.flatten(2) for y in (q, k, v, raw_gate, raw_beta)]
    rows = torch.cat(parts, dim=-1)
    if cu_seqlens is not None:
        rows[:, cu_seqlens[-1] :] = torch.nan
    parts = list(rows.to(dtype).split([y.shape[-1] for y in parts], dim=-1))
    if not packed:
        # an empty slice counts as contiguous with any strides
        parts = [y.clone(memory_format=torch.contiguous_format) for y in parts]
    rates = {"harsh": torch.full((HV,), 16.0), "slow": torch.full((HV,), 1e-3)}
    A_log = rates.get(gate, torch.empty(HV).uniform_(1, 16)).log().to(device)
    inputs: dict[str, Any] = {
        "q": parts[0].unflatten(-1, (H, K)),
        "k": parts[1].unflatten(-1, (H, K)),
        "v": parts[2].unflatten(-1, (HV, V)),
        "raw_gate": parts[3].unflatten(-1, (HV, K)),
        "raw_beta": parts[4],
        "A_log": A_log if rate else None,
        "dt_bias": torch.randn(HV, K, device=device) if dt_bias else None,
        "lower_bound": -5.0 if gate == "bounded" else None,
        "beta_scale": beta_scale,
        "qk_norm_eps": 1e-6 if norm else None,
    }
    if scale is not None:
        inputs["scale"] = scale
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=index_dtype, device=device)
    return inputs
