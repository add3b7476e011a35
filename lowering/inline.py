"""Lower an operator by tracing a function and lowering the traced graph in the operator's place.

Two functions can stand behind an operator: its reference, whose ATen operations become IR that
fuses with the neighbours, or its kernel launcher, whose Triton launches become nodes of the graph
(`triton_kernel_wrapper_mutation`): the generated code then launches the hand-written kernel by
name, with no dispatcher in between, and Inductor plans the memory of its outputs and workspace.
`triton_op` would do the second alone, but is decomposed before any rewrite can see it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from threading import Thread
from typing import Any

import torch
from sympy import Integer
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import _maybe_layout_constraints as layout_constraints
from torch._inductor.lowering import (
    fallback_handler,
    fallbacks,
    lowerings,
    needs_realized_inputs,
    register_lowering,
)
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from kda_ops._gradients import Backward
from kda_ops._registry import Operator
from kda_ops._saving import Launched
from kda_ops.lowering import compat
from kda_ops.native import NATIVE
from kda_ops.tuning import override

COMPILE_SECONDS = 300
NEEDS_IMPORT = (
    "this AOTInductor package calls operators of kda_ops, which are in Python: "
    "a process that loads it must import kda_ops before"
)


def lowers(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers the lowering of one operator.

    If a graph with the operator was compiled before, Inductor has made it a fallback; what that
    left behind is removed first.
    """
    layout_constraints.pop(op, None)
    needs_realized_inputs.discard(op)
    fallbacks.discard(op)
    lowerings.pop(op, None)

    def register(lower: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(lower)
        def lower_one(*args: Any, **kwargs: Any) -> Any:
            compat.weigh_hinted_sizes()
            return lower(*args, **kwargs)

        return register_lowering(op, type_promotion_kind=None)(lower_one)

    return register


def on_gpu(x: Any) -> bool:
    """Whether a lowering argument is on a device that runs Triton kernels."""
    return x.get_device().type == "cuda"


def call_operator(*args: Any) -> Any:
    """Lowers the current node to a call of the operator itself: its native kernel, if there is one
    (`kda_ops.native`), else its CPU implementation.
    """
    op = V.graph.current_node.target
    if V.graph.aot_mode:
        warnings.warn(NEEDS_IMPORT, stacklevel=2)
    return fallback_handler(NATIVE.get(op, op), add_to_fallback_set=False)(*args)


def inline_reference(reference: Callable[..., Any], *args: Any) -> Any:
    """Lowers the current node to the ATen operations of its reference, as fusible IR."""
    return inline(reference, args, fake_arguments())


def inline_launcher(
    launcher: Callable[..., Any],
    *args: Any,
    values: Sequence[Any] | None = None,
    writes: Sequence[Any] | None = None,
) -> Any:
    """Lowers the current node to the kernel launches (and allocations) of its launcher.

    If `args` are not the node's own arguments, `values` are their fake values, and `writes` those
    that are written.

    The launcher reads strides from its arguments while it is traced, so the buffers are held to
    exactly those strides; see `_placed`.
    """
    if values is None:
        values = fake_arguments()
        declared = V.graph.current_node.target._schema.arguments
        writes = [x for x, argument in zip(args, declared, strict=True) if argument.is_write]
    return inline(launcher, args, values, exact_strides=True, writes=writes or ())


def lower_to_kernel(operator: Operator | Backward | Launched) -> None:
    """Registers the lowering of an operator with a hand-written kernel, or of its gradient: its
    launches on a GPU, a call of its own implementation elsewhere.
    """
    launcher = operator.launcher
    assert launcher is not None, f"{operator.op} has no kernel"

    def lower(*args: Any) -> Any:
        if on_gpu(args[0]):
            return inline_launcher(launcher, *args)
        return call_operator(*args)

    lowers(operator.op)(lower)


def lower_to_reference(operator: Operator) -> None:
    """Registers the lowering of an operator that fuses with its neighbours."""

    def lower(*args: Any) -> Any:
        return inline_reference(operator.reference, *args)

    lowers(operator.op)(lower)


def fake_arguments() -> tuple[Any, ...]:
    """The arguments of the current node: fake tensors, symbolic and other values."""
    return torch.fx.node.map_arg(V.graph.current_node.args, lambda node: node.meta["val"])


def compile_call(op: Any, args: list[Any], overrides: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of an operator on given tensors, compiled while something else is being compiled.

    `overrides` are chosen for it (see `kda_ops.tuning.override`), to be timed against something
    else. A thread of its own has none of the modes and contexts of the compilation that is going
    on.

    Raises:
        RuntimeError: It did not compile.
    """
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
    inputs = [args[i] for i in places]

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(args)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        return op(*filled)

    found: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            with override(overrides), torch.no_grad():
                found.append(torch._inductor.compile(make_fx(call)(*inputs), inputs))
        except Exception as error:
            errors.append(error)

    thread = Thread(target=work, name=f"kda_ops compiles {op}", daemon=True)
    thread.start()
    thread.join(COMPILE_SECONDS)
    if not found:
        raise RuntimeError(f"{op} did not compile") from (errors[0] if errors else None)
    return lambda: found[0](*inputs)


def inline(
    function: Callable[..., Any],
    args: Sequence[Any],
    values: Sequence[Any],
    *,
    exact_strides: bool = False,
    writes: Sequence[Any] = (),
) -> Any:
    """Lowers what a function does to `args`, traced with the fake `values` of them. It writes to
    `writes`.
    """
    traced = [
        i for i, value in enumerate(values) if isinstance(value, (torch.Tensor, torch.SymInt))
    ]

    def call(*inputs: Any) -> Any:
        filled = list(values)
        for i, x in zip(traced, inputs, strict=True):
            filled[i] = x
        return function(*filled)

    inputs = [args[i] for i in traced]
    shown = [values[i] for i in traced]
    copied = []
    if exact_strides:
        written = [x for x in inputs if any(x is y for y in writes)]
        for x in written:
            x.realize()  # what is not in memory yet would be computed into a buffer of its own
        placed = [_placed(x, value) for x, value in zip(inputs, shown, strict=True)]
        copied = [
            (x, y)
            for x, (y, _) in zip(inputs, placed, strict=True)
            if any(x is z for z in written) and x.get_name() != y.get_name()
        ]
        inputs, shown = [list(y) for y in zip(*placed, strict=True)]
    with V.fake_mode:
        graph = make_fx(call, decomposition_table=select_decomp_table())(*shown)
    result = compat.inline_subgraph(graph, inputs)
    for x, y in copied:
        lowerings[torch.ops.aten.copy_.default](x, y)
    return result


def _placed(x: Any, value: Any) -> tuple[Any, Any]:
    """An argument of a launcher, and what the launcher is traced with in its place.

    Inductor pads the rows of a large intermediate result whose width is not a multiple of 128
    bytes, and with them the strides of its slices. To ask for the strides of the graph then is to
    ask for a copy; the launcher takes any, so it is traced with those there are, where they are
    numbers: all of them or none, or entries would overlap.
    """
    if not isinstance(x, ir.TensorBox):
        return x, value
    base = x.data.unwrap_view() if isinstance(x.data, ir.BaseView) else x.data
    if ir.is_storage_and_layout(base) and isinstance(base.get_layout(), ir.FixedLayout):
        real = ir.ExternKernel.realize_input(x)
        there = real.get_layout().stride
        other = [
            i
            for i, (size, own) in enumerate(zip(value.shape, value.stride(), strict=True))
            if not (isinstance(size, int) and size == 1) and not _same(own, there[i])
        ]
        if other and all(isinstance(there[i], (int, Integer)) for i in other):
            strides = [int(there[i]) if i in other else own for i, own in enumerate(value.stride())]
            with V.fake_mode:
                value = torch.empty_strided(
                    value.shape, strides, dtype=value.dtype, device=value.device
                )
            return ir.TensorBox(real), value
    return ir.ExternKernel.require_exact_strides(x, value.stride()), value


def _same(stride: Any, expression: Any) -> bool:
    """Whether a stride of a fake tensor is provably that of a layout."""
    known = stride.node.expr if isinstance(stride, torch.SymInt) else stride
    return bool(V.graph.sizevars.statically_known_equals(known, expression))
