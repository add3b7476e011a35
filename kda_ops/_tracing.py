"""What a call does differently while it is traced: it reads no values, and keeps the sizes of a
server's batch from being specialized.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# the fields of its batch that each kind of step reads
DECODE = ("counts", "state_indices", "cu_seqlens", "num_accepted")
PREFILL = (
    "counts",
    "state_indices",
    "has_initial_state",
    "prefill_cu_seqlens",
    "prefill_copies",
    "chunk_indices",
    "block_table",
    "context_lens",
)
READ = {
    "decode": DECODE,
    "prefill": PREFILL,
    "mixed": (*DECODE, *PREFILL),
}


def reads_values(x: Tensor) -> bool:
    """Whether the values of `x` can be read: it is neither traced nor fake."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    if type(x) is Tensor:
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(x, FakeTensor)


def open_sizes(batch: Any, hidden_states: Tensor) -> None:
    """Makes the sizes that change from step to step unbacked for Dynamo, which traces this.

    By default Dynamo specializes a size to a constant, then to a symbol of at least 2: counts of 0
    and 1, and counts that happen to be equal, get their own graphs. Does nothing with
    `dynamic=False`, or for tensors that the graph has already read or computes itself.
    """
    from torch._dynamo.comptime import comptime

    comptime(_open_sizes)  # `batch` comes first: Dynamo reads the first argument of a call


def _open_sizes(context: Any) -> None:
    """Runs while `open_sizes` is traced, on Dynamo's variables for its arguments."""
    from torch._dynamo import config, exc

    if config.assume_static_by_default and not config.automatic_dynamic_shapes:
        return
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    batch, rows = (tracer.symbolic_locals[name] for name in ("batch", "hidden_states"))
    parts = {
        name: batch.var_getattr(tracer, name)
        for name in READ[batch.var_getattr(tracer, "kind").as_python_constant()]
    }
    given, counts = _unread(rows), _unread(parts["counts"])
    if given is not None:
        if counts is not None and given.dim() == 3 and given.shape[1] != counts.shape[5]:
            shape = [1, counts.shape[5], given.shape[2]]
            raise exc.UserError(
                exc.UserErrorType.INVALID_INPUT,
                f"hidden_states must have shape {shape}, got {tuple(given.shape)}",
            )
        _open(rows, [1])
        _free_stride(tracer.output.tracked_fakes, rows.source, 0)
    for name, part in parts.items():
        _open(part, range(6) if name == "counts" else [0])


def _unread(variable: Any) -> Tensor | None:
    """The tensor of a variable, if the graph has not read it yet."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if type(variable) is not LazyVariableTracker or variable.is_realized():
        return None
    x = variable.peek_value()
    return x if type(x) is Tensor else None


def _open(variable: Any, axes: Iterable[int]) -> None:
    """Makes a tensor an input of the graph, with unbacked sizes on these axes."""
    from torch._dynamo.decorators import mark_unbacked

    x = _unread(variable)
    if x is None:
        return
    before = dict(x.__dict__)
    marks = ("_dynamo_static_indices", "_dynamo_unbacked_indices")
    own = {axis for name in marks for axis in before.get(name, ())}
    try:
        for axis in set(axes) - own:
            # rounded up, as Inductor's caches go by it
            mark_unbacked(x, axis, hint_override=1 << max(x.shape[axis] - 1, 0).bit_length())
        variable.realize()
    finally:  # the marks are for this graph, not for others that the caller compiles
        x.__dict__.clear()
        x.__dict__.update(before)


def _free_stride(inputs: Iterable[Any], source: Any, axis: int) -> None:
    """Removes the stride of an axis of size 1 from the guards of an input.

    Where the rows are part of a larger buffer, or empty, it does not follow from the sizes; no
    result depends on it.
    """
    for tracked in inputs:
        fake = tracked.fake
        if tracked.source != source or fake.dim() <= axis or fake.shape[axis] != 1:
            continue
        sizes, strides = fake.fake_mode.shape_env, list(fake.stride())
        with fake.fake_mode, sizes.ignore_fresh_unbacked_symbols():
            strides[axis] = sizes.create_unbacked_symint()
            tracked.fake = torch.empty_strided(
                fake.shape, strides, dtype=fake.dtype, device=fake.device
            )


def hint(size: torch.SymInt) -> int | None:
    """The hint of a symbolic size, None if it has none."""
    if size.node.hint is not None:
        return int(size.node.hint)
    marked = size.node.shape_env.var_to_hint_override
    known = size.node.expr.xreplace(marked)
    return int(known) if getattr(known, "is_number", True) else None
