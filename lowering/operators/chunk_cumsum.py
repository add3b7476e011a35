"""The chunk-local cumulative sum as a scan: one kernel with the operators that make its input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import slice_, to_dtype, view
from torch._inductor.utils import ceildiv, sympy_product
from torch._inductor.virtualized import V, ops

from kda_ops.gating.chunk_cumsum.op import chunk_cumsum_op
from kda_ops.lowering.inline import call_operator, lowers, on_gpu

Index = Callable[[Sequence[sympy.Expr]], Any]
Place = Callable[[Sequence[sympy.Expr]], Sequence[sympy.Expr]]


@ir.ir_dataclass
class ScatterScan(ir.Scan):
    """A scan that stores its element `index` at `place(index)` of a buffer of `out_size`.

    It also stores a zero at `cleared(index)`, if that is given: so one kernel writes every element
    of a buffer that the scan alone does not cover.
    """

    out_size: Sequence[sympy.Expr]
    place: Place
    cleared: Place | None = None

    def get_size(self) -> Sequence[sympy.Expr]:
        return self.out_size

    def store_reduction(
        self, output_name: str | None, indexer: Any, vars: Any, scan_vars: Any
    ) -> Any:
        index = self.reindex(vars, scan_vars)
        (sums,) = ops.scan(self.dtypes, self.combine_fn, (self.inner_fn(index),))
        name = output_name or "unnamed"
        if self.cleared is not None:
            ops.store(name, indexer(self.cleared(index)), ops.constant(0.0, self.dtype))
        sums = ops.to_dtype(sums, self.dtype)
        return ops.store(name, indexer(self.place(index)), sums)


@dataclass(frozen=True)
class Direction:
    """Which way the sums of a chunk go, and the dtype that they are stored in, None for that of
    what is summed.
    """

    reverse: bool = False
    dtype: torch.dtype | None = None

    def place(self, r: sympy.Expr, chunk_size: int) -> sympy.Expr:
        """The token of a chunk that is the r-th to be summed."""
        return chunk_size - 1 - r if self.reverse else r


FORWARD = Direction()


def scan_chunks(
    g: Any,
    size: Sequence[sympy.Expr],
    value: Index,
    out_size: Sequence[sympy.Expr],
    place: Place,
    cleared: Place | None = None,
    *,
    dtype: torch.dtype,
) -> Any:
    """The buffer, of `dtype`, of a `ScatterScan` over axis 2 of `size = [B, rows, C, ...]`, in g's
    dtype.
    """
    device = g.get_device()
    data = ScatterScan(
        device=device,
        dtype=dtype,
        dtypes=(g.get_dtype(),),
        inner_fn=value,
        inner_fns=(value,),
        size=size,
        ranges=[*size[:2], *size[3:]],
        scan_ranges=[size[2]],
        combine_fn=lambda a, b: (ops.add(a[0], b[0]),),
        reindex=lambda index, scan: [*index[:2], *scan, *index[2:]],
        reduction_hint=ir.ReductionHint.DEFAULT,
        output_index=0,
        out_size=out_size,
        place=place,
        cleared=cleared,
    )
    buffer = ir.ComputedBuffer(
        name=None, layout=ir.FixedLayout(device, dtype, list(out_size)), data=data
    )
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return ir.TensorBox.create(buffer)


def fixed_length(g: Any, chunk_size: int, scale: float, direction: Direction = FORWARD) -> Any:
    """Every batch entry is one sequence: row n of entry b is its n-th chunk."""
    B, T, *D = g.get_size()
    load, dtype = g.make_loader(), g.get_dtype()
    out = {"dtype": direction.dtype or dtype}
    size = [B, ceildiv(T, chunk_size), sympy.Integer(chunk_size), *D]
    whole = V.graph.sizevars.statically_known_multiple_of(T, chunk_size)

    def value(index: Sequence[sympy.Expr]) -> Any:
        b, n, r, *d = index
        t = n * chunk_size + direction.place(r, chunk_size)
        if whole:
            x = load([b, t, *d])
        else:
            x = ops.masked(ops.lt(_int64(t), _int64(T)), lambda: load([b, t, *d]), 0.0)
        return ops.mul(x, ops.constant(scale, dtype))

    def place(index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
        b, n, r, *d = index
        t = n * chunk_size + direction.place(r, chunk_size)
        return [_row_or_spare(ops.lt(_int64(t), _int64(T)), _int64(b * T + t), B * T), *d]

    def same(index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
        b, n, r, *d = index
        return [b, n, direction.place(r, chunk_size), *d]

    if whole:
        return view(scan_chunks(g, size, value, size, same, **out), [B, T, *D])
    padded = scan_chunks(g, size, value, [B * T + 1, *D], place, **out)
    return view(slice_(padded, 0, 0, B * T), [B, T, *D])


def varlen(
    g: Any, chunk_size: int, scale: float, cu_seqlens: Any, chunk_indices: Any,
    direction: Direction = FORWARD,
) -> Any:  # fmt: skip
    """Row n is row n of the chunk table; its lanes also zero the n-th C tokens of the padding.

    Whatever the tables hold, every access is in bounds.
    """
    _, T, *D = g.get_size()
    for table in (cu_seqlens, chunk_indices):
        table.realize()  # or every element would compute the chunk table anew
    sequences = cu_seqlens.get_size()[0] - 1
    load, dtype = g.make_loader(), g.get_dtype()
    load_offset, load_chunk = cu_seqlens.make_loader(), chunk_indices.make_loader()
    size = [sympy.Integer(1), chunk_indices.get_size()[0], sympy.Integer(chunk_size), *D]
    zero = sympy.Integer(0)

    def token(n: sympy.Expr, r: sympy.Expr) -> tuple[Any, Any]:
        """The token of lane r of row n, and whether there is one."""
        sequence, chunk = _int64(load_chunk([n, zero])), _int64(load_chunk([n, sympy.Integer(1)]))
        real = ops.and_(ops.ge(sequence, _int64(0)), ops.lt(sequence, _int64(sequences)))
        real = ops.and_(real, ops.ge(chunk, _int64(0)))
        sequence = ops.indirect_indexing(
            ops.where(real, sequence, _int64(0)), sequences, check=False, wrap_neg=False
        )
        first = ops.maximum(_int64(load_offset([sequence])), _int64(0))
        last = ops.minimum(_int64(load_offset([sequence + 1])), _int64(T))
        r = direction.place(r, chunk_size)
        t = ops.add(first, ops.add(ops.mul(chunk, _int64(chunk_size)), _int64(r)))
        return t, ops.and_(real, ops.lt(t, last))

    def value(index: Sequence[sympy.Expr]) -> Any:
        _, n, r, *d = index
        t, ok = token(n, r)
        source = ops.indirect_indexing(ops.where(ok, t, _int64(0)), T, check=False, wrap_neg=False)
        x = ops.mul(load([zero, source, *d]), ops.constant(scale, dtype))
        return ops.where(ok, x, ops.constant(0.0, dtype))

    def place(index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
        _, n, r, *d = index
        t, ok = token(n, r)
        return [_row_or_spare(ok, t, T), *d]

    def cleared(index: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
        _, n, r, *d = index
        last = ops.maximum(_int64(load_offset([sequences])), _int64(0))
        t = ops.add(last, _int64(n * chunk_size + r))
        return [_row_or_spare(ops.lt(t, _int64(T)), t, T), *d]

    out = {"dtype": direction.dtype or dtype}
    padded = scan_chunks(g, size, value, [T + 1, *D], place, cleared, **out)
    return view(slice_(padded, 0, 0, T), [1, T, *D])


def _int64(value: Any) -> Any:
    """An int64 value of a symbolic expression or of an integer value."""
    if isinstance(value, (int, sympy.Expr)):
        return ops.index_expr(sympy.sympify(value), torch.int64)
    return ops.to_dtype(value, torch.int64)


def _row_or_spare(ok: Any, row: Any, spare: sympy.Expr) -> sympy.Expr:
    """The index `row` where `ok`, else the one row past the result, which nobody reads."""
    return ops.indirect_indexing(
        ops.where(ok, row, _int64(spare)), spare + 1, check=False, wrap_neg=False
    )


def sums_in_chunks(
    g: Any, chunk_size: int, scale: float, tables: tuple[Any, Any], direction: Direction = FORWARD
) -> Any:
    """The scan over the chunks of a batch of either kind; `tables`: cu_seqlens, chunk_indices."""
    if tables[0] is None:
        return fixed_length(g, chunk_size, scale, direction)
    return varlen(g, chunk_size, scale, *tables, direction)


def has_chunks(g: Any, cu_seqlens: Any) -> bool:
    """Whether a batch on a GPU may have elements and sequences."""
    same = V.graph.sizevars.statically_known_equals
    empty = same(sympy_product(g.get_size()), 0)
    empty = empty or (cu_seqlens is not None and same(cu_seqlens.get_size()[0], 1))
    return on_gpu(g) and not empty


@lowers(chunk_cumsum_op)
def lower_chunk_cumsum(
    g: Any, chunk_size: int, scale: float, cu_seqlens: Any, chunk_indices: Any
) -> Any:
    if not has_chunks(g, cu_seqlens):
        return call_operator(g, chunk_size, scale, cu_seqlens, chunk_indices)
    g = to_dtype(g, torch.promote_types(g.get_dtype(), torch.float32))
    return sums_in_chunks(g, chunk_size, scale, (cu_seqlens, chunk_indices))
