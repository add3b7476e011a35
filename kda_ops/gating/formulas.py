"""The gate in eager PyTorch, for the references of the operators that compute it.

No finite input gives NaN, in value or gradient. A gate may be -inf: a decay of 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_ops._numerics import RCP_LN2, accumulation_dtype
from kda_ops.varlen import chunk_tokens, real_rows

# The range to which `A_log` is clamped: the rate, also times 1 / ln 2, is a normal number, so that
# no 0 * inf gives NaN. Rates above count as e^88, which decays everything to 0 as well.
RATES = {torch.float32: (-87.0, 88.0), torch.float64: (-708.0, 709.0)}
# A decay in log2 that takes every number of the dtype to 0.
FORGOTTEN = {torch.float32: -300.0, torch.float64: -2100.0}
# Gates and rates of larger magnitude have no gradient: its sums over tokens could overflow.
STEEPEST = 2.0**64


class _Gate(torch.autograd.Function):
    """The gate of `z [..., HV, K]` and the clamped `A_log [HV, 1]`.

    Autograd would multiply the gradient by a rate and a slope in turn, of which one may overflow
    where the other is 0; here they are multiplied first.
    """

    @staticmethod
    def forward(z: Tensor, A_log: Tensor | None, lower_bound: float | None) -> Tensor:
        a = 1.0 if A_log is None else A_log.exp()
        if lower_bound is not None:
            return lower_bound * torch.sigmoid(z if A_log is None else a * z)
        return -(a * F.softplus(z))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, A_log, ctx.lower_bound = inputs
        ctx.save_for_backward(z, A_log, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, A_log, g = ctx.saved_tensors
        of_z, of_A = _gate_gradients(z, A_log, ctx.lower_bound, g, gradient)
        return of_z, None if A_log is None else of_A.sum_to_size(A_log.shape), None


def _gate_gradients(
    z: Tensor, A_log: Tensor | None, lower_bound: float | None, g: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of z and, token by token, of the clamped `A_log [HV, 1]`, from that of the gate
    g.
    """
    a = torch.ones_like(z[..., :1]) if A_log is None else A_log.exp()
    if lower_bound is None:
        gradient = torch.where(g < -STEEPEST, 0.0, gradient)
        of_z = -(a * torch.sigmoid(z))
        of_A = g.clamp(min=-STEEPEST)
    else:
        t = (a * z).clamp(-1e3, 1e3)
        slope = lower_bound * torch.sigmoid(t) * torch.sigmoid(-t)
        of_z = torch.where(a > STEEPEST, 0.0, a) * slope
        of_A = t * slope
    return gradient * of_z, gradient * of_A


def gate_nats(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    """The per-channel log decay in nats, `x [..., HV, K]`, in the accumulation dtype.

    `F.softplus` flushes `exp(z)` to 0 below -17 only in the naive form; with `log1p` it is exact
    down to the smallest normal number, and it is linear above 20.
    """
    acc = accumulation_dtype(x)
    z = x.to(acc)
    if dt_bias is not None:
        z = z + dt_bias.to(acc).reshape(x.shape[-2:])
    if A_log is not None:
        A_log = A_log.to(acc).clamp(*RATES[acc]).unsqueeze(-1)
    g: Tensor = _Gate.apply(z, A_log, lower_bound)
    return g


def gate_nats_gradients(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and, token by token, of A_log, `x [..., HV, K]`, from that of `gate_nats`,
    in the accumulation dtype. That of dt_bias is the sum of x's.
    """
    acc = accumulation_dtype(x)
    z, clamped, inside = x.to(acc), None, None
    if dt_bias is not None:
        z = z + dt_bias.to(acc).reshape(x.shape[-2:])
    if A_log is not None:
        rate, (least, most) = A_log.to(acc).unsqueeze(-1), RATES[acc]
        clamped, inside = rate.clamp(least, most), (rate >= least) & (rate <= most)
    g = _Gate.forward(z, clamped, lower_bound)
    of_z, of_A = _gate_gradients(z, clamped, lower_bound, g, gradient.to(acc))
    return of_z, of_A if inside is None else torch.where(inside, of_A, 0.0)


def cumulative_gate(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    *,
    to_be_seen: bool,
) -> Tensor:
    """The chunks' prefix sums of the gate in log2, `x [B, T, HV, K]`, in the accumulation dtype.

    Finite, since infinite sums have no difference. Sums `to_be_seen` are results in themselves, and
    at least the least finite number. Others are only used as differences of tokens in exponents, so
    a token that decays to 0 counts as `FORGOTTEN`, next to which smaller gates keep their digits.
    """
    g = gate_nats(real_rows(x, cu_seqlens, 0.0), A_log, dt_bias, lower_bound)
    if lower_bound is None and not to_be_seen:
        g = g.clamp(min=FORGOTTEN[g.dtype] / RCP_LN2)
    G = chunk_local_cumsum(g, chunk_size, cu_seqlens, chunk_indices) * RCP_LN2
    return G.clamp(min=torch.finfo(G.dtype).min) if lower_bound is None else G


def chunk_local_cumsum(
    g: Tensor, chunk_size: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None
) -> Tensor:
    """Inclusive prefix sum of `g [B, T, ...]` along T that restarts with every chunk, in g's dtype.

    Each chunk is summed separately: a difference of sums over the whole length would lose small
    terms. With `cu_seqlens`, the chunks are those of the chunk table, and padding rows are zero.
    """
    B, T = g.shape[:2]
    if cu_seqlens is None:
        rows = -(-T // chunk_size)
        padding = g.new_zeros(B, rows * chunk_size - T, *g.shape[2:])
        sums = torch.cat([g, padding], 1).unflatten(1, (rows, chunk_size)).cumsum(2)
        return sums.flatten(1, 2)[:, :T].contiguous()
    token = chunk_tokens(cu_seqlens, chunk_indices, chunk_size, T)
    padded = torch.cat([g[0], g.new_zeros(1, *g.shape[2:])])
    sums = padded[token].cumsum(1)
    return (
        torch.zeros_like(padded).index_copy(0, token.flatten(), sums.flatten(0, 1))[:T].unsqueeze(0)
    )
