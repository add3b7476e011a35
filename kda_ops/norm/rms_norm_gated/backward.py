"""The gradient of `rms_norm_gated` on a GPU."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kda_ops._launch import is_nvidia, traceable
from kda_ops.kernel import LOG2E, quick_reciprocal, to_fp32
from kda_ops.norm.kernel import four_axes, row_offset
from kda_ops.tuning import choose


@triton.jit
def rms_norm_gated_backward_kernel(
    o_ptr, gate_ptr, weight_ptr, dy_ptr, do_ptr, dgate_ptr, totals_ptr,
    rows, steps, size_1, size_2,
    o_stride_0, o_stride_1, o_stride_2, gate_stride_0, gate_stride_1, gate_stride_2,
    EPS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    DENSE: tl.constexpr, NEED_O: tl.constexpr, NEED_GATE: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of `steps` blocks of BLOCK_ROWS rows of [V], and its part
    of the weight's, a row of `totals`.

    Grid: (groups of blocks); rows count over three leading axes.
    """
    v = tl.arange(0, BLOCK_V)
    weight = tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)  # of rows in registers: added up at the end
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK_ROWS
    for step in range(steps):
        row = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        ok = (row < rows)[:, None] & (v < V)[None, :]
        dense = row[:, None] * V + v[None, :]
        if DENSE:
            o_at = dense
            gate_at = dense
        else:
            o_row = row_offset(row, size_1, size_2, o_stride_0, o_stride_1, o_stride_2)
            gate_row = row_offset(row, size_1, size_2, gate_stride_0, gate_stride_1, gate_stride_2)
            o_at = o_row[:, None] + v[None, :]
            gate_at = gate_row[:, None] + v[None, :]
        o = to_fp32(tl.load(o_ptr + o_at, mask=ok, other=0.0), PACKED)  # [BLOCK_ROWS, BLOCK_V]
        z = to_fp32(tl.load(gate_ptr + gate_at, mask=ok, other=0.0), PACKED)
        dy = to_fp32(tl.load(dy_ptr + dense, mask=ok, other=0.0), PACKED)
        gate = quick_reciprocal(1.0 + tl.exp2(z * -LOG2E), PACKED)
        scale = tl.rsqrt(tl.sum(o * o, axis=1) / V + EPS)[:, None]
        y = o * scale
        of_normed = dy * gate
        of_weight = of_normed * y
        product = of_weight * weight[None, :]
        if NEED_O:
            along = tl.sum(product, axis=1)[:, None] / V
            do = scale * (of_normed * weight[None, :] - y * along)
            tl.store(do_ptr + dense, do.to(do_ptr.dtype.element_ty), mask=ok)
        if NEED_GATE:
            dgate = product - product * gate
            tl.store(dgate_ptr + dense, dgate.to(dgate_ptr.dtype.element_ty), mask=ok)
        if NEED_WEIGHT:
            total += of_weight
    if NEED_WEIGHT:
        part = totals_ptr + tl.program_id(0).to(tl.int64) * V + v
        tl.store(part, tl.sum(total, axis=0), mask=v < V)


def launch_rms_norm_gated_backward(
    o: Tensor, output_gate: Tensor, weight: Tensor, eps: float,
    output_gradients: Sequence[Tensor | None], needs_gradient: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    (dy,) = output_gradients
    needs = needs_gradient[:3]
    if dy is None or o.numel() == 0:
        inputs = (o, output_gate, weight)
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            for x, need in zip(inputs, needs, strict=True)
            if need
        ]
    V = o.shape[-1]
    o4, gate4 = four_axes(o), four_axes(output_gate)
    rows = o.numel() // V
    block_v = triton.next_power_of_2(V)
    dense = o4.is_contiguous() and gate4.is_contiguous()
    chosen = choose("rms_norm_gated_backward", o.device, V=V, dtype=o.dtype)
    block_rows = max(1, chosen["TILE"] // block_v)
    blocks = triton.cdiv(rows, block_rows)
    steps = torch.sym_max(1, blocks // chosen["PROGRAMS"])
    programs = triton.cdiv(blocks, steps)
    found = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((o, output_gate), needs[:2], strict=True)
    ]
    totals = torch.empty((programs, V) if needs[2] else (0,), dtype=torch.float32, device=o.device)
    traceable(rms_norm_gated_backward_kernel)[(programs,)](
        o4, gate4, weight.contiguous(), dy.contiguous(), *found, totals, rows, steps, o4.shape[1],
        o4.shape[2], *o4.stride()[:3], *gate4.stride()[:3],
        EPS=eps, V=V, BLOCK_V=block_v, BLOCK_ROWS=block_rows, DENSE=dense, NEED_O=needs[0],
        NEED_GATE=needs[1], NEED_WEIGHT=needs[2], PACKED=is_nvidia(o.device),
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    gradients = [x for x, need in zip(found, needs[:2], strict=True) if need]
    if needs[2]:
        gradients.append(totals.sum(0).to(weight.dtype))
    return gradients
